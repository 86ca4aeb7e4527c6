//! Images written by the QEMU of some day read the same for ever: the digests were computed by another program.

use std::fs;
use std::path::Path;

use qchain::chain::graph::NodeId;
use qchain::ops::delete::ModeChoice;
use qchain::progress::{Cancel, Silent};
use qchain::store::chain::OpenChain;
use qchain::store::digest::view_digest;
use qchain::store::names::resolve_one;
use qchain::store::record::StoreKind;

use super::support::store::{delete_well, init, open, scan};

/// The digests of all members of a store, `(name, digest)`.
fn digests(root: &Path, names: &[&str]) -> Vec<(String, String)> {
    let stores = open(root);
    let scan = scan(&stores);
    let digest = |name: &&str| {
        let id: NodeId = resolve_one(&stores, &scan, name).unwrap();
        let chain = OpenChain::of_member(&stores, &scan, id).unwrap();
        ((*name).to_owned(), view_digest(&chain, &Silent, &Cancel::default()).unwrap().to_string())
    };
    names.iter().map(digest).collect()
}

#[test]
fn the_small_chain() {
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/small-chain");
    let expected: serde_json::Value =
        serde_json::from_slice(&fs::read(fixture.join("expected.json")).unwrap()).unwrap();
    let expected = |names: &[&str]| -> Vec<(String, String)> {
        let of = |name: &&str| ((*name).to_owned(), expected["digests"][*name].as_str().unwrap().to_owned());
        names.iter().map(of).collect()
    };
    assert_eq!(digests(&fixture, &["base", "a", "b"]), expected(&["base", "a", "b"]));
    for deleted in ["a", "base"] {
        let folder = tempfile::tempdir().unwrap();
        for name in ["base", "a", "b"] {
            fs::copy(fixture.join(name), folder.path().join(name)).unwrap();
        }
        init(folder.path(), StoreKind::Plain);
        delete_well(folder.path(), &[deleted], ModeChoice::Copy);
        let left: Vec<&str> = ["base", "a", "b"].into_iter().filter(|name| *name != deleted).collect();
        assert_eq!(digests(folder.path(), &left), expected(&left));
    }
}
