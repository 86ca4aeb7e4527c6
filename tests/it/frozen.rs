//! Images written by the QEMU of some day read the same for ever: the digests were computed by another program.

use std::fs;
use std::path::Path;

use qchain::ops::delete::ModeChoice;
use qchain::store::record::StoreKind;

use super::support::store::{delete_well, digests, init, open};

#[test]
fn the_small_chain() {
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/small-chain");
    let expected: serde_json::Value =
        serde_json::from_slice(&fs::read(fixture.join("expected.json")).unwrap()).unwrap();
    let expected = |names: &[&str]| -> Vec<(String, String)> {
        let of = |name: &&str| ((*name).to_owned(), expected["digests"][*name].as_str().unwrap().to_owned());
        names.iter().map(of).collect()
    };
    assert_eq!(digests(&open(&fixture), &["base", "a", "b"]), expected(&["base", "a", "b"]));
    for deleted in ["a", "base"] {
        let folder = tempfile::tempdir().unwrap();
        for name in ["base", "a", "b"] {
            fs::copy(fixture.join(name), folder.path().join(name)).unwrap();
        }
        init(folder.path(), StoreKind::Plain);
        delete_well(folder.path(), &[deleted], ModeChoice::Copy);
        let left: Vec<&str> = ["base", "a", "b"].into_iter().filter(|name| *name != deleted).collect();
        assert_eq!(digests(&open(folder.path()), &left), expected(&left));
    }
}
