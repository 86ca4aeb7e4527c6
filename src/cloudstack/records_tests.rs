//! Exports as mysql prints them, and broken ones.

use proptest::prelude::*;

use super::{Column, Records, RecordsError, RefState, Row};
use crate::failure::{Code, Failure, Kind};

const HEADER: &str = "store_uuid\tstore_url\tstore_role\tsnapshot_id\tsnapshot_uuid\tsnapshot_name\t\
    account_id\tvolume_id\thypervisor_type\tsnapshot_status\tref_state\tinstall_path\tparent_snapshot_id\t\
    end_of_chain\tsize\tphysical_size\tkvm_checkpoint_path\tcreated";

fn row(id: u64, url: &str, state: &str, path: &str) -> String {
    format!(
        "uuid\t{url}\tImage\t{id}\tapi-{id}\tmy\\tname\\n\\\\\t2\t7\tKVM\tBackedUp\t{state}\t{path}\t0\t0\t\
         1073741824\t193024\t/mnt/x/checkpoints/2/7/a\t2025-01-02 03:04:05"
    )
}

fn parse(lines: &[&str]) -> Result<Records, RecordsError> {
    Records::parse((lines.join("\n") + "\n").as_bytes())
}

#[test]
fn a_row_is_read_whole() {
    let records = parse(&[HEADER, &row(5, "nfs://nas/e", "Hidden", "snapshots/2/7/a")]).unwrap();
    let expected = Row {
        line: 2,
        store_uuid: Some("uuid".into()),
        store_url: Some("nfs://nas/e".into()),
        store_role: "Image".into(),
        snapshot_id: 5,
        snapshot_uuid: Some("api-5".into()),
        snapshot_name: Some("my\tname\n\\".into()),
        account_id: 2,
        volume_id: 7,
        hypervisor_type: Some("KVM".into()),
        snapshot_status: Some("BackedUp".into()),
        ref_state: RefState::Hidden,
        install_path: Some("snapshots/2/7/a".into()),
        parent_snapshot_id: None,
        end_of_chain: false,
        size_bytes: Some(1 << 30),
        physical_bytes: Some(193_024),
        kvm_checkpoint_path: Some("/mnt/x/checkpoints/2/7/a".into()),
        created: Some("2025-01-02 03:04:05".into()),
    };
    assert_eq!(records.rows(), [expected]);
}

#[test]
fn columns_come_in_any_order_with_others_between() {
    let line = row(5, "nfs://nas/e", "Ready", "snapshots/2/7/a");
    let turn = |line: &str| {
        let mut fields: Vec<&str> = line.split('\t').collect();
        fields.reverse();
        fields.insert(3, "extra");
        fields.join("\t")
    };
    let plain = parse(&[HEADER, &line]).unwrap();
    let turned = parse(&[&turn(HEADER), &turn(&line)]).unwrap();
    assert_eq!(plain.rows(), turned.rows());
    let windows = Records::parse(format!("{HEADER}\r\n{line}\r\n").as_bytes()).unwrap();
    assert_eq!(plain.rows(), windows.rows());
}

#[test]
fn nulls_flags_and_states() {
    let line = row(5, "NULL", "Migrating", "\\N")
        .replace("\t0\t0\t1073741824\t193024\t", "\t4\t1\tNULL\tNULL\t")
        .replace("uuid\t", "NULL\t");
    let records = parse(&[HEADER, &line]).unwrap();
    let row = &records.rows()[0];
    assert_eq!((&row.store_uuid, &row.store_url, &row.install_path), (&None, &None, &None));
    assert_eq!((row.parent_snapshot_id, row.end_of_chain, row.size_bytes), (Some(4), true, None));
    assert_eq!(row.ref_state.as_str(), "Migrating");
    assert!(!row.deletable());
    for (field, expected) in [("0", false), ("1", true), ("\\0", false), ("\u{1}", true), ("NULL", false)] {
        let line = line.replace("\t4\t1\t", &format!("\t4\t{field}\t"));
        assert_eq!(parse(&[HEADER, &line]).unwrap().rows()[0].end_of_chain, expected, "{field:?}");
    }
}

#[test]
fn look_up_by_path_and_store() {
    let records = parse(&[
        HEADER,
        &row(1, "nfs://nas/e1", "Hidden", "snapshots/2/7/a"),
        &row(1, "nfs://nas/e2", "Ready", "snapshots/2/7/a"),
        &row(2, "nfs://nas/e1", "Destroyed", "/snapshots/2/7/b"),
        &row(3, "NULL", "Hidden", "snapshots/2/7/c"),
    ])
    .unwrap();
    let look = |path: &str, url| records.lookup(path, url).map(|row| (row.line, row.deletable()));
    assert_eq!(look("snapshots/2/7/a", Some("nfs://NAS//e1/")), Some((2, true)));
    assert_eq!(look("snapshots/2/7/a", Some("nfs://nas/e2")), Some((3, false)));
    assert_eq!(look("snapshots/2/7/a", None), Some((3, false)), "in doubt it is in use");
    assert_eq!(look("snapshots/2/7/a", Some("nfs://nas/e3")), None);
    assert_eq!(look("snapshots/2/7/b", None), Some((4, true)));
    assert_eq!(look("snapshots/2/7/c", Some("nfs://nas/e1")), None, "a row without a store fits none");
    assert_eq!(look("snapshots/2/7/c", None), Some((5, true)));
    assert_eq!(look("snapshots/2/7/z", None), None);
}

#[test]
fn errors_name_line_and_column() {
    let good = row(5, "nfs://nas/e", "Ready", "a");
    let message = |lines: &[&str]| parse(lines).unwrap_err().to_string();
    assert_eq!(Records::parse(b"").unwrap_err(), RecordsError::Empty);
    assert_eq!(Records::parse(b"\n\n").unwrap_err(), RecordsError::Empty);
    for column in Column::ALL {
        let header = HEADER.replacen(column.name(), "other", 1);
        assert!(parse(&[&header]).is_err(), "{column:?}");
    }
    assert_eq!(message(&[&HEADER.replace("ref_state", "state")]), "line 1: column ref_state is missing");
    assert_eq!(message(&[&format!("{HEADER}\tsize")]), "line 1: column size is there twice");
    assert_eq!(message(&[HEADER, &good, "a\tb"]), "line 3: 2 fields, but the header has 18");
    assert_eq!(
        message(&[HEADER, &good.replace("193024", "many")]),
        "line 2, column physical_size: \"many\" is no number"
    );
    assert_eq!(
        message(&[HEADER, &good.replace("\tReady\t", "\tNULL\t")]),
        "line 2, column ref_state: \"NULL\" is not allowed to be NULL"
    );
    assert_eq!(
        message(&[HEADER, &good.replace("\\n", "\\q")]),
        "line 2, column snapshot_name: \"my\\\\tname\\\\q\\\\\\\\\" is badly escaped"
    );
    assert_eq!(
        message(&[HEADER, &good.replace("\t0\t0\t", "\t0\tyes\t")]),
        "line 2, column end_of_chain: \"yes\" is neither 0 nor 1"
    );
    let mut text = HEADER.as_bytes().to_vec();
    text.extend(b"\n\xff");
    let error = Records::parse(&text).unwrap_err();
    assert_eq!(error, RecordsError::NotText { line: 2 });
    assert_eq!((error.kind(), error.code()), (Kind::Usage, Code::BadRecords));
}

proptest! {
    #[test]
    fn any_bytes_end_well(lines in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..60), 0..5)) {
        let mut text = HEADER.as_bytes().to_vec();
        for line in lines {
            text.push(b'\n');
            text.extend(line);
        }
        let _ = Records::parse(&text);
    }

    #[test]
    fn any_fields_end_well(fields in prop::collection::vec("[0-9a-z\\\\]{0,4}|NULL", 18)) {
        let _ = parse(&[HEADER, &fields.join("\t")]);
    }
}
