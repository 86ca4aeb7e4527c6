//! The rules that the compiler does not hold: import arrows, who touches files, nothing that panics, sizes.
//!
//! A rule that has to give way gets an entry in one of the lists below, with its reason; no rule is bent in
//! the code.
#![expect(clippy::unwrap_used, reason = "a test that cannot read its sources has failed")]

mod scan;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use scan::{functions, line_of, paths, product};

/// The layers in import order: a module imports only from itself and from earlier ones.
const LAYERS: &[&str] = &[
    "units",
    "ids",
    "failure",
    "progress",
    "backend",
    "qcow2",
    "digest",
    "chain",
    "cloudstack",
    "database",
    "store",
    "change",
    "ops",
    "peer",
    "service",
    "cli",
];

/// Layers that never see a backend.
const PURE: &[&str] = &["digest", "chain", "cloudstack"];

/// Modules of `ops` that are no verbs, so that verbs may import them: `(name, reason)`.
const OPS_SHARED: &[(&str, &str)] = &[
    ("document", "what the documents of all verbs have in common"),
    ("error", "the one error enum of the layer"),
    ("policy", "how chains should be, for who tells and who mends"),
];

/// What only the backend uses: `(root, first names below it)`, none for all of it.
const FILE_IO: &[(&str, &[&str])] = &[
    ("std", &["fs", "os.fd", "os.unix", "os.linux"]),
    ("rustix", &["fs", "io"]),
    ("nix", &[]),
    ("fs2", &[]),
    ("reflink_copy", &[]),
    ("tempfile", &[]),
];

/// Files outside the backend that may touch files, none of them a store's: `(file, reason)`.
const FILE_IO_ALLOWED: &[(&str, &str)] = &[
    ("src/cli/config.rs", "reads the configuration"),
    ("src/service/auth.rs", "reads the file of tokens"),
    ("src/peer/zone.rs", "reads the token of another zone"),
    ("src/cli/copy.rs", "makes the file of --records-out, which is on no store"),
    ("src/database/source.rs", "reads exports of CloudStack's rows"),
    ("src/cli/metrics_file.rs", "replaces the file of --metrics-file, which is on no store"),
    ("src/cli/members.rs", "reads the lists of members given as @FILE"),
];

/// The calls that give a file the name of another, or one more.
const RENAMES: &[&str] = &[".rename(", ".rename_dir(", ".exchange(", ".hard_link("];

/// Where they may stand: the one publisher, and the implementations of the calls.
const RENAME_ALLOWED: &[&str] = &[
    "src/backend/publish",
    "src/backend/posix",
    "src/backend/nfs3",
    "src/backend/memory",
    "src/backend/faulty",
    "src/backend/slow",
    "src/backend/conformance",
];

/// Calls that end the program. `assert!` is left for broken invariants of our own, with a message.
const PANICS: &[&str] = &[
    ".unwrap()",
    ".unwrap_err()",
    ".expect(",
    ".expect_err(",
    "panic!",
    "todo!",
    "unimplemented!",
    "unreachable!",
    "dbg!",
];

/// The longest file, in lines; half of that is the aim.
const FILE_LINES: usize = 700;
/// The longest function, in lines.
const FUNCTION_LINES: usize = 70;

/// One source file.
struct Source {
    /// Its path from the package's root, with `/`.
    path: String,
    /// Without comments, literals and tests; nothing if all of it is a test.
    code: String,
}

impl Source {
    /// Its module's path: `[ops, delete, plan]` for `src/ops/delete/plan.rs`.
    fn module(&self) -> Vec<&str> {
        let inner = self.path.trim_start_matches("src/").trim_end_matches(".rs");
        inner.trim_end_matches("/mod").split('/').filter(|part| !matches!(*part, "lib" | "main")).collect()
    }

    /// All modules of this crate that it names, as paths from the crate's root.
    fn imports(&self) -> Vec<Vec<String>> {
        let mut found = paths(&self.code, "crate");
        for path in paths(&self.code, "super") {
            let ups = path.iter().take_while(|part| *part == "super").count();
            let module = self.module();
            let base = module.iter().take(module.len().saturating_sub(ups + 1));
            found.push(base.map(|part| (*part).to_owned()).chain(path.into_iter().skip(ups)).collect());
        }
        found
    }
}

/// All Rust files below a directory, sorted by path.
fn files(directory: &str) -> Vec<(String, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut waiting = vec![root.join(directory)];
    let mut found: Vec<PathBuf> = Vec::new();
    while let Some(directory) = waiting.pop() {
        for entry in fs::read_dir(&directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                waiting.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path);
            }
        }
    }
    found.sort();
    let name = |path: &Path| path.strip_prefix(root).unwrap().to_str().unwrap().replace('\\', "/");
    found.iter().map(|path| (name(path), fs::read_to_string(path).unwrap())).collect()
}

fn sources() -> Vec<Source> {
    let mut test_files = BTreeSet::new();
    let mut sources = Vec::new();
    for (path, text) in files("src") {
        let product = product(&text);
        let (directory, file) = path.rsplit_once('/').unwrap();
        // A module's children lie beside `mod.rs`, else in a directory named for it; a given path is
        // always beside the file.
        let stem = file.trim_end_matches(".rs");
        for module in &product.test_modules {
            test_files.insert(format!("{directory}/{module}"));
            test_files.insert(format!("{directory}/{stem}/{module}"));
        }
        sources.push(Source { code: product.code, path });
    }
    for source in &mut sources {
        let inside = |test: &String| source.path.starts_with(&format!("{}/", test.trim_end_matches(".rs")));
        if test_files.contains(&source.path) || test_files.iter().any(inside) {
            source.code.clear();
        }
    }
    assert!(sources.len() > 10, "the sources were not found");
    sources
}

/// Fails with all that was found.
fn none(found: &[String]) {
    assert!(found.is_empty(), "\n{}\n", found.join("\n"));
}

fn rank(layer: &str) -> Option<usize> {
    LAYERS.iter().position(|other| *other == layer)
}

#[test]
fn nobody_imports_from_a_later_layer() {
    let mut found = Vec::new();
    for source in sources() {
        let module = source.module();
        // `lib.rs` and `main.rs` tie the layers together.
        let Some(&from) = module.first() else { continue };
        let Some(own) = rank(from) else {
            found.push(format!("{}: {from} is no layer", source.path));
            continue;
        };
        for path in source.imports() {
            let Some(to) = path.first() else { continue };
            let wrong = match rank(to) {
                None => true,
                Some(other) => other > own || (to == "backend" && PURE.contains(&from)),
            };
            if wrong {
                found.push(format!("{}: {from} must not import {}", source.path, path.join("::")));
            }
        }
    }
    none(&found);
}

#[test]
fn verbs_do_not_import_each_other() {
    let sources = sources();
    let shared = |name: &str| OPS_SHARED.iter().any(|(other, _)| *other == name);
    let verbs: BTreeSet<String> = sources
        .iter()
        .filter_map(|source| match source.module()[..] {
            ["ops", verb, ..] if !shared(verb) => Some(verb.to_owned()),
            _ => None,
        })
        .collect();
    let mut found = Vec::new();
    for source in &sources {
        let ["ops", own, ..] = source.module()[..] else { continue };
        for path in source.imports() {
            if let [first, other, ..] = &path[..]
                && first == "ops"
                && other != own
                && verbs.contains(other)
            {
                found.push(format!("{}: {own} must not import {}", source.path, path.join("::")));
            }
        }
    }
    none(&found);
}

#[test]
fn only_the_backend_touches_files() {
    let mut found = Vec::new();
    for source in sources() {
        let allowed = FILE_IO_ALLOWED.iter().any(|(file, _)| *file == source.path);
        if allowed || source.path.starts_with("src/backend/") {
            continue;
        }
        for (root, names) in FILE_IO {
            for path in paths(&source.code, root) {
                let path = path.join(".");
                let under = |name: &&str| path == **name || path.starts_with(&format!("{name}."));
                if names.is_empty() || names.iter().any(under) {
                    found.push(format!("{}: {root}.{path} belongs to the backend", source.path));
                }
            }
        }
    }
    none(&found);
}

/// Every place in the sources where one of the texts stands, as whole words.
fn places(sources: &[Source], texts: &[&str]) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for source in sources {
        for text in texts {
            for (at, _) in source.code.match_indices(text) {
                let inner = |c: char| c.is_alphanumeric() || c == '_';
                if !text.starts_with('.') && source.code[..at].ends_with(inner) {
                    continue;
                }
                let line = line_of(&source.code, at);
                found.push((source.path.clone(), format!("{}:{line}: {text}", source.path)));
            }
        }
    }
    found
}

#[test]
fn only_publish_renames() {
    let found: Vec<String> = places(&sources(), RENAMES)
        .into_iter()
        .filter(|(path, _)| !RENAME_ALLOWED.iter().any(|allowed| path.starts_with(allowed)))
        .map(|(_, place)| place)
        .collect();
    none(&found);
}

#[test]
fn nothing_panics_on_input() {
    let found: Vec<String> = places(&sources(), PANICS).into_iter().map(|(_, place)| place).collect();
    none(&found);
}

#[test]
fn files_and_functions_are_short_and_files_say_what_they_are() {
    let mut found = Vec::new();
    for (path, text) in files("src").into_iter().chain(files("tests")) {
        let lines = text.lines().count();
        if lines > FILE_LINES {
            found.push(format!("{path}: {lines} lines, more than {FILE_LINES}"));
        }
        // A `tests.rs` is told by its place.
        if !text.starts_with("//!") && !path.ends_with("/tests.rs") {
            found.push(format!("{path}: does not begin with a //! head"));
        }
        for function in functions(&scan::blanked(&text)) {
            if function.lines > FUNCTION_LINES {
                let (line, name, lines) = (function.line, function.name, function.lines);
                found.push(format!("{path}:{line}: {name} has {lines} lines, more than {FUNCTION_LINES}"));
            }
        }
    }
    none(&found);
}

#[test]
fn every_test_file_runs() {
    let files = files("tests/it");
    let (_, main) = files.iter().find(|(path, _)| path == "tests/it/main.rs").unwrap();
    let declared: BTreeSet<String> = scan::blanked(main)
        .lines()
        .filter_map(|line| line.trim().strip_prefix("mod ")?.strip_suffix(';').map(str::to_owned))
        .collect();
    let mut found = Vec::new();
    for (path, _) in &files {
        let inner = path.trim_start_matches("tests/it/").trim_end_matches(".rs");
        let module = inner.split('/').next().unwrap_or_default();
        if module != "main" && !declared.contains(module) {
            found.push(format!("{path}: main.rs has no `mod {module};`"));
        }
    }
    none(&found);
}

/// The rules see what they forbid: a source that breaks each of them once.
#[test]
fn the_rules_would_notice() {
    let bad = "use crate::backend::Backend; use super::super::super::cli; fn f() { std::fs::read(x).unwrap(); a.rename(b); a.exchange(b, c) }";
    let source = Source { path: "src/chain/deep/bad.rs".to_owned(), code: product(bad).code };
    let imports: Vec<_> = source.imports().iter().map(|path| path.join("::")).collect();
    assert_eq!(imports, ["backend::Backend", "cli"]);
    assert_eq!(paths(&source.code, "std"), [["fs", "read"]]);
    let renames = places(std::slice::from_ref(&source), RENAMES);
    assert_eq!(renames.len(), 2);
    let found = places(&[source], &[".unwrap()", "panic!"]);
    assert_eq!(found.len(), 1);
}
