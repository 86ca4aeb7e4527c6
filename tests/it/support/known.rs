//! What is known of members, held against what they are: a manifest in force is right, and nothing else is kept.

use std::collections::BTreeSet;

use qchain::change::sweep;
use qchain::change::{Site, SystemClock};
use qchain::ops::verify::{Level, Verdict};
use qchain::progress::Cancel;
use qchain::store::Stores;
use qchain::store::manifest::shelf::{Known, Shelf};
use qchain::store::manifest::stem;
use qchain::store::record::own;

use super::killing::LONG;
use super::store::{digests, scan, verify_in};

/// Whether what is not known is as good as what is right, or a fault too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// All members are adopted and right.
    All,
    /// What is in force is right; the rest is not known, and nobody is alarmed.
    OnlyRight,
}

/// What is wrong with what is known of the only store's members, once everything was recovered: manifests that are not
/// the file's or not true of it, alarms of `verify --level data`; and what lies about after a sweep that belongs to none.
pub fn wrong(stores: &Stores, wanted: Wanted) -> (Vec<String>, Vec<String>) {
    let mut wrong = Vec::new();
    let scan = scan(stores);
    let store = stores.get(0).unwrap();
    let shelf = Shelf::load(store).unwrap();
    let (mut manifests, mut tables) = (BTreeSet::new(), BTreeSet::new());
    for id in scan.graph.ids() {
        let (path, member) = (&scan.graph.node(id).key.path, scan.member(id).unwrap());
        match shelf.find(store, path, &member.stat).unwrap() {
            Known::Current(manifest) => {
                let is = digests(stores, &[path.as_str()]).remove(0).1;
                if manifest.view_digest.to_string() != is {
                    wrong.push(format!("the manifest of {path} is of another view"));
                }
                manifests.insert(format!("{}.{}", stem(path), manifest.file.inode));
                tables.insert(manifest.leaves.name.clone());
            }
            Known::Nothing if wanted == Wanted::OnlyRight => {}
            other => wrong.push(format!("of {path} is known: {other:?}")),
        }
    }
    let report = verify_in(stores, Level::Data);
    let unknown = |code: &str| wanted == Wanted::OnlyRight && code.ends_with("not-adopted");
    wrong.extend(
        report.findings.iter().filter(|one| !unknown(one.code.as_str())).map(|one| format!("{one:?}")),
    );
    let alarms = report.checked.iter().filter(|one| one.verdict == Verdict::Damaged);
    wrong.extend(alarms.map(|one| format!("an alarm: {one:?}")));
    let cancel = Cancel::default();
    if !store.backend().read_dir(&own(&["intents"])).unwrap().is_empty() {
        // What is kept for an undo is known still.
        return (wrong, Vec::new());
    }
    sweep::manifests(&Site::new(stores, &SystemClock, &cancel, LONG)).unwrap();
    let names = |directory: &str| -> Vec<String> {
        let entries = store.backend().read_dir(&own(&[directory])).unwrap();
        entries.into_iter().map(|entry| entry.name.unwrap()).collect()
    };
    let of_file = |name: &String| name.matches('.').count() == 2;
    let belongs = |name: &String| {
        let known = name.rsplit_once('.').is_some_and(|(file, _)| manifests.contains(file));
        known || !of_file(name)
    };
    let mut strays: Vec<String> = names("manifests").into_iter().filter(|name| !belongs(name)).collect();
    strays.extend(names("leaves").into_iter().filter(|name| !tables.contains(name)));
    (wrong, strays)
}
