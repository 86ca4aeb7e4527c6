//! The corpus of hostile images, and the program on them with what it took.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;
use tempfile::TempDir;

use super::qemu::{must, text};

const MEASURED: &str = include_str!("measured.py");

/// One image of the corpus.
pub struct Image {
    /// Its file, from the corpus' directory.
    pub file: String,
    /// What is wrong with it.
    pub family: String,
    /// The code that headers and tables give, `readable`, or `any` of both.
    pub structure: String,
    /// The same for the whole view.
    pub reading: String,
}

/// The corpus, with a home for caches beside it.
pub struct Corpus {
    directory: TempDir,
    /// All of it.
    pub images: Vec<Image>,
}

/// What one call came to.
#[derive(Debug)]
pub struct Outcome {
    /// The exit code; below 0 a signal.
    pub exit: i64,
    /// Seconds of CPU.
    pub cpu: f64,
    /// The most memory that it had, in bytes.
    pub rss: u64,
    /// What it printed, if that was a document.
    pub document: Option<Value>,
}

impl Outcome {
    /// The codes of the findings and of the error.
    pub fn codes(&self) -> BTreeSet<String> {
        let Some(document) = &self.document else { return BTreeSet::new() };
        let findings = document["findings"].as_array().into_iter().flatten();
        let errors = [&document["error"]].into_iter().chain(refused(document));
        let code = |value: &Value| value["code"].as_str().map(str::to_owned);
        findings.chain(errors).filter_map(code).collect()
    }
}

fn refused(document: &Value) -> impl Iterator<Item = &Value> {
    document["refused"].as_array().into_iter().flatten().map(|refused| &refused["error"])
}

impl Corpus {
    /// Makes it.
    pub fn make() -> Self {
        let directory = tempfile::tempdir_in("/dev/shm").unwrap();
        // What makes it looks at what it is made in.
        fs::create_dir(directory.path().join("cache")).unwrap();
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/make-hostile");
        must(text(&script), &[text(&directory.path().join("corpus"))]);
        let list = fs::read_to_string(directory.path().join("corpus/corpus.json")).unwrap();
        let images = serde_json::from_str::<Vec<Value>>(&list).unwrap().into_iter().map(|entry| {
            let field = |name: &str| entry[name].as_str().unwrap().to_owned();
            let (structure, reading) = (field("structure"), field("reading"));
            Image { file: field("file"), family: field("family"), structure, reading }
        });
        let images = images.collect();
        Self { directory, images }
    }

    /// All of it as one store.
    pub fn root(&self) -> PathBuf {
        self.directory.path().join("corpus")
    }

    /// The store that an image is alone in, but for what it names.
    pub fn store(&self, image: &Image) -> PathBuf {
        self.root().join(&image.file).parent().unwrap().to_path_buf()
    }

    /// Where the program keeps its cache.
    pub fn cache(&self) -> PathBuf {
        self.directory.path().join("cache")
    }

    /// The program with these arguments on a store.
    pub fn call(store: &Path, arguments: &[&str]) -> Vec<String> {
        let program = [env!("CARGO_BIN_EXE_qchain"), "--json", "--store", text(store)];
        program.iter().chain(arguments).map(|part| (*part).to_owned()).collect()
    }

    /// Runs calls one after the other, each with so many seconds of CPU at most.
    pub fn measure(&self, seconds: u64, calls: &[Vec<String>]) -> Vec<Outcome> {
        let mut runner = Command::new("python3")
            .args(["-c", MEASURED])
            .env("XDG_CACHE_HOME", self.cache())
            .env_remove("QCHAIN_STORE")
            .env_remove("QCHAIN_CONFIG")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let line = |call: &Vec<String>| -> Vec<Value> {
            std::iter::once(seconds.into()).chain(call.iter().map(|part| part.clone().into())).collect()
        };
        let list = serde_json::to_vec(&calls.iter().map(line).collect::<Vec<_>>()).unwrap();
        let mut input = runner.stdin.take().unwrap();
        let feeder = std::thread::spawn(move || input.write_all(&list).unwrap());
        let output = runner.wait_with_output().unwrap();
        feeder.join().unwrap();
        assert!(output.status.success(), "{}", output.status);
        let outcomes: Vec<Outcome> = String::from_utf8(output.stdout).unwrap().lines().map(outcome).collect();
        assert_eq!(outcomes.len(), calls.len());
        outcomes
    }
}

fn outcome(line: &str) -> Outcome {
    let value: Value = serde_json::from_str(line).unwrap();
    Outcome {
        exit: value["exit"].as_i64().unwrap(),
        cpu: value["cpu"].as_f64().unwrap(),
        rss: value["rss"].as_u64().unwrap(),
        document: serde_json::from_str(value["out"].as_str().unwrap()).ok(),
    }
}
