//! Images that somebody made to do harm: each has a stable code or is read right, in little time and memory, and no name
//! in them is ever opened.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use serde_json::Value;

use super::support::crash::full;
use super::support::hostile::{Corpus, Image, Outcome};
use super::support::qemu::{run, text};

/// The memory that a call may take, threads and all.
const RSS_BYTES: u64 = 64 << 20;
/// The CPU that looking at headers and tables may take, in seconds.
const CPU_SECONDS: f64 = 1.0;
/// What reads a view may be at it for as long as this before it is stopped: some claim exabytes of zeros.
const PATIENCE_SECONDS: u64 = 10;

/// Complaints, to be shown together.
#[derive(Default)]
struct Complaints(Vec<String>);

impl Complaints {
    fn bounded(&mut self, what: &str, outcome: &Outcome, cpu_seconds: f64) {
        if outcome.rss > RSS_BYTES || outcome.cpu > cpu_seconds {
            self.0.push(format!("{what}: {:.2} s, {} MiB", outcome.cpu, outcome.rss >> 20));
        }
    }

    fn expect(&mut self, good: bool, what: &str, outcome: &Outcome, wanted: &str) {
        if !good {
            let codes = outcome.codes();
            self.0.push(format!("{what}: not {wanted}: exit {}, {codes:?}", outcome.exit));
        }
    }
}

impl Drop for Complaints {
    fn drop(&mut self) {
        assert!(self.0.is_empty() || std::thread::panicking(), "\n{}\n", self.0.join("\n"));
    }
}

/// One that the program came to an end with, and said what it has to say.
fn ended(outcome: &Outcome) -> bool {
    (0..=8).contains(&outcome.exit) && outcome.document.is_some()
}

fn worst(outcomes: &[Outcome]) -> String {
    let cpu = outcomes.iter().map(|outcome| outcome.cpu).fold(0.0, f64::max);
    let rss = outcomes.iter().map(|outcome| outcome.rss).max().unwrap_or_default();
    format!("{} calls, at most {cpu:.2} s and {} MiB", outcomes.len(), rss >> 20)
}

/// What an image's own store tells of it, and of nobody else.
fn verdict(outcome: &Outcome) -> Option<&str> {
    outcome.document.as_ref()?["checked"].as_array()?.first()?["verdict"].as_str()
}

#[test]
fn headers_and_tables_have_stable_codes_in_little_time_and_memory() {
    let corpus = Corpus::make();
    let families: BTreeSet<&str> = corpus.images.iter().map(|image| image.family.as_str()).collect();
    assert!(corpus.images.len() >= 300 && families.len() >= 60);
    let mut calls = vec![Corpus::call(&corpus.root(), &["list"])];
    for image in &corpus.images {
        calls.push(Corpus::call(&corpus.store(image), &["list"]));
        calls.push(Corpus::call(&corpus.store(image), &["verify", "image", "--level", "structure"]));
    }
    let outcomes = corpus.measure(PATIENCE_SECONDS, &calls);
    eprintln!("{} images in {} families: {}", corpus.images.len(), families.len(), worst(&outcomes));
    let mut complaints = Complaints::default();
    let (whole, each) = outcomes.split_first().unwrap();
    complaints.bounded("list of all", whole, CPU_SECONDS);
    let together = findings(whole);
    for (image, pair) in corpus.images.iter().zip(each.chunks(2)) {
        let [list, verify] = pair else { panic!("two calls an image") };
        for (verb, outcome) in [("list", list), ("verify", verify)] {
            let what = format!("{verb} {}", image.file);
            complaints.bounded(&what, outcome, CPU_SECONDS);
            complaints.expect(ended(outcome), &what, outcome, "ended");
        }
        let codes: BTreeSet<String> = list.codes().union(&verify.codes()).cloned().collect();
        let good = match image.structure.as_str() {
            "any" | "readable-above-cycle" => true,
            "readable" => verdict(verify) == Some("sound") && list.codes().is_empty(),
            code => codes.contains(code) && verdict(verify) != Some("sound"),
        };
        complaints.expect(good, &image.file, verify, &image.structure);
        // In a crowd it is told the same of.
        let alone = findings(list).remove("image").unwrap_or_default();
        let crowded = together.get(&image.file).cloned().unwrap_or_default();
        complaints.expect(
            alone == crowded,
            &format!("{} among all", image.file),
            whole,
            &format!("{alone:?}"),
        );
    }
}

/// The codes that `list` has, by member.
fn findings(list: &Outcome) -> BTreeMap<String, BTreeSet<String>> {
    let mut found = BTreeMap::<String, BTreeSet<String>>::new();
    let document = list.document.as_ref().unwrap();
    for finding in document["findings"].as_array().unwrap() {
        let field = |name: &str| finding[name].as_str().unwrap().to_owned();
        let names = field("member");
        found
            .entry(names.rsplit_once(':').map_or(names.clone(), |(_, path)| path.to_owned()))
            .or_default()
            .insert(field("code"));
    }
    found
}

#[test]
fn every_other_verb_refuses_or_stays_small() {
    let corpus = Corpus::make();
    let verbs: [(&str, &[&str]); 8] = [
        ("digest", &["digest", "image"]),
        ("map", &["map", "image"]),
        ("links", &["verify", "image", "--level", "links"]),
        ("data", &["verify", "image", "--level", "data"]),
        ("audit", &["audit"]),
        ("adopt", &["adopt", "image", "--now"]),
        ("delete", &["delete", "image", "--dry-run", "--now", "--end-of-chain"]),
        ("consolidate", &["consolidate", "image", "--dry-run", "--now"]),
    ];
    let mut families = BTreeSet::new();
    let chosen: Vec<&Image> = corpus
        .images
        .iter()
        .filter(|image| families.insert(&image.family) || full() || heavy(image))
        .collect();
    let mut calls = Vec::new();
    for image in &chosen {
        calls.push(Corpus::call(&corpus.store(image), &["init", "--kind", "plain"]));
        calls.extend(verbs.iter().map(|(_, arguments)| Corpus::call(&corpus.store(image), arguments)));
    }
    let outcomes = corpus.measure(PATIENCE_SECONDS, &calls);
    eprintln!("{} images: {}", chosen.len(), worst(&outcomes));
    let mut complaints = Complaints::default();
    let mut stopped = Vec::new();
    for (image, outcomes) in chosen.iter().zip(outcomes.chunks(1 + verbs.len())) {
        for ((verb, _), outcome) in verbs.iter().zip(&outcomes[1..]) {
            let what = format!("{verb} {}", image.file);
            complaints.bounded(&what, outcome, f64::INFINITY);
            // SIGKILL at the end of our patience; what was printed of a long map is no document then.
            if outcome.exit == -9 {
                stopped.push(what);
                continue;
            }
            let long = *verb == "map" && outcome.document.is_none();
            complaints.expect(ended(outcome) || long, &what, outcome, "ended");
            if *verb == "digest" {
                let good = match image.reading.as_str() {
                    "any" => true,
                    "readable" => outcome.exit == 0,
                    code => outcome.codes().contains(code),
                };
                complaints.expect(good, &what, outcome, &image.reading);
            }
        }
    }
    eprintln!("stopped after {PATIENCE_SECONDS} s of CPU: {stopped:?}");
}

/// Those whose members differ in what they cost.
fn heavy(image: &Image) -> bool {
    [
        "compressed",
        "l1-",
        "refcount-table",
        "references",
        "shuffled",
        "snapshots",
        "sparse",
        "tables",
        "amplification",
    ]
    .iter()
    .any(|name| image.family.starts_with(name))
}

/// Where any program looks, whatever it is asked.
const SYSTEM: &[&str] = &[
    "/etc/ld.so.",
    "/lib/",
    "/lib64/",
    "/usr/lib/",
    "/proc/self/",
    "/sys/fs/cgroup/",
    "/sys/devices/system/",
    "/etc/qchain/",
    "/dev/null",
    "/proc/sys/vm/overcommit_memory",
];

#[test]
fn no_path_outside_the_store_is_opened() {
    let corpus = Corpus::make();
    let log = corpus.cache().with_file_name("strace");
    let named = |image: &&Image| {
        ["name", "data-file", "symlink", "cycle", "fifo", "unix"]
            .iter()
            .any(|part| image.family.starts_with(part))
    };
    let mut calls = vec![
        Corpus::call(&corpus.root(), &["list"]),
        Corpus::call(&corpus.root(), &["verify", "--level", "structure", "name-json/"]),
    ];
    for image in corpus.images.iter().filter(named) {
        for arguments in [&["verify", "image", "--level", "data"][..], &["map", "image"]] {
            calls.push(Corpus::call(&corpus.store(image), arguments));
        }
    }
    let mut seen = 0;
    for call in &calls {
        let call: Vec<&str> = call.iter().map(String::as_str).collect();
        let cache = format!("XDG_CACHE_HOME={}", text(&corpus.cache()));
        // The exit code is the program's, which refuses most of them.
        let mut arguments = vec![
            "-f",
            "-qq",
            "-s",
            "4096",
            "-e",
            "trace=%file,%network",
            "-o",
            text(&log),
            "env",
            "-u",
            "LD_LIBRARY_PATH",
            &cache,
        ];
        arguments.extend(&call);
        run("strace", &arguments);
        let trace = fs::read_to_string(&log).unwrap();
        let program = trace.split_once(&format!("execve(\"{}\"", call[0])).unwrap().1;
        for line in program.lines().skip(1) {
            seen += usize::from(opened(line, &corpus, Path::new(call[0])));
        }
    }
    assert!(seen > 1000, "{seen} paths: strace tells nothing");
}

/// Whether a line of strace tells of a path; fails if that is none of ours.
fn opened(line: &str, corpus: &Corpus, program: &Path) -> bool {
    for call in ["connect(", "bind(", "sendto("] {
        assert!(!line.contains(call), "{line}");
    }
    // Where it was started is no name of anybody's.
    if line.contains("getcwd(") {
        return false;
    }
    let Some((_, rest)) = line.split_once('"') else { return false };
    let path = rest.split('"').next().unwrap();
    if path.starts_with('/') {
        let path = Path::new(path);
        let ours = [corpus.root(), corpus.cache(), program.to_owned()];
        let inside = ours.iter().any(|place| path.starts_with(place))
            || SYSTEM.iter().any(|place| text(path).starts_with(place));
        assert!(inside, "{line}");
    } else if !path.is_empty() {
        // Beside an open directory of the store, and by no link that lies there.
        assert!(!path.split('/').any(|part| part == ".."), "{line}");
        let follows =
            line.contains("openat(") && !line.contains("O_NOFOLLOW") && !line.contains("O_DIRECTORY");
        assert!(!follows, "{line}");
    }
    true
}

#[test]
fn the_same_seed_makes_the_same_corpus() {
    let (one, other) = (Corpus::make(), Corpus::make());
    let digest = |corpus: &Corpus, image: &Image| {
        let path = corpus.root().join(&image.file);
        let kind = fs::symlink_metadata(&path).unwrap();
        // Giants are holes behind their first bytes.
        (kind.is_file() && kind.len() < 1 << 24).then(|| fs::read(path).unwrap())
    };
    for image in &one.images {
        assert!(digest(&one, image) == digest(&other, image), "{}", image.file);
    }
    let list = |corpus: &Corpus| {
        serde_json::from_slice::<Value>(&fs::read(corpus.root().join("corpus.json")).unwrap()).unwrap()
    };
    assert_eq!(list(&one), list(&other));
}
