//! What a merge changes in CloudStack's rows: values, and the statements that make them so.
//!
//! A merge of A into B takes A's row away for CloudStack's garbage collection (state `Destroyed`, which drops rows
//! without children) and gives B the parent that A had and the length that its file has now. A statement names
//! all that the row was planned with, so that it changes the row as it was planned, or none.

use std::fmt::Write as _;

use serde::{Deserialize, Serialize};

use super::records::Row;

/// Which row of `snapshot_store_ref`, of role `Image`, and how it was planned with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Planned {
    /// `image_store.uuid`.
    pub store_uuid: String,
    /// `snapshot_id`.
    pub snapshot_id: u64,
    /// `state`.
    pub state: String,
    /// `parent_snapshot_id`; `None` for 0 and NULL.
    pub parent_snapshot_id: Option<u64>,
    /// `install_path`.
    pub install_path: String,
}

impl Planned {
    /// What an exported row says; `None` for a row without a store or a path, which names no file.
    #[must_use]
    pub fn of(row: &Row) -> Option<Self> {
        Some(Self {
            store_uuid: row.store_uuid.clone()?,
            snapshot_id: row.snapshot_id,
            state: row.ref_state.as_str().to_owned(),
            parent_snapshot_id: row.parent_snapshot_id,
            install_path: row.install_path.clone()?,
        })
    }
}

/// What a row is to say.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Set {
    /// The deleted member's: its state.
    State(String),
    /// The survivor's: its parent, and its file's length in bytes.
    Parent {
        /// `parent_snapshot_id`; `None`: 0.
        parent_snapshot_id: Option<u64>,
        /// `physical_size`.
        physical_bytes: u64,
    },
}

/// One row and what becomes of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RowChange {
    /// The row.
    pub planned: Planned,
    /// What it is to say.
    pub set: Set,
}

impl RowChange {
    /// Whether a row says what is wanted already.
    #[must_use]
    pub fn is_done(&self, now: &Planned, physical_bytes: Option<u64>) -> bool {
        match &self.set {
            Set::State(state) => now.state == *state,
            Set::Parent { parent_snapshot_id, physical_bytes: wanted } => {
                now.parent_snapshot_id == *parent_snapshot_id && physical_bytes == Some(*wanted)
            }
        }
    }

    /// The statement that changes this row if it still reads as planned, and nothing otherwise.
    #[must_use]
    pub fn statement(&self) -> String {
        let Planned { store_uuid, snapshot_id, state, parent_snapshot_id, install_path } = &self.planned;
        let mut text = String::from(
            "UPDATE snapshot_store_ref AS ref INNER JOIN image_store AS store ON store.id = ref.store_id SET ",
        );
        // Writing into a string cannot fail.
        let _ = match &self.set {
            Set::State(state) => write!(text, "ref.state = {}", quoted(state)),
            Set::Parent { parent_snapshot_id, physical_bytes } => write!(
                text,
                "ref.parent_snapshot_id = {}, ref.physical_size = {physical_bytes}",
                parent_snapshot_id.unwrap_or(0)
            ),
        };
        let _ = write!(
            text,
            " WHERE store.uuid = {} AND ref.store_role = 'Image' AND ref.snapshot_id = {snapshot_id} AND \
             ref.state = {} AND COALESCE(ref.parent_snapshot_id, 0) = {} AND ref.install_path = {}",
            quoted(store_uuid),
            quoted(state),
            parent_snapshot_id.unwrap_or(0),
            quoted(install_path)
        );
        text
    }
}

/// A string literal of MySQL and MariaDB, whatever `NO_BACKSLASH_ESCAPES` says: quotes are doubled, and what could
/// be an escape is written in hex.
fn quoted(text: &str) -> String {
    if text.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'\\' || byte == b' ') {
        return format!("'{}'", text.replace('\'', "''"));
    }
    let mut hex = String::from("CONVERT(X'");
    for byte in text.bytes() {
        let _ = write!(hex, "{byte:02X}");
    }
    hex.push_str("' USING utf8mb4)");
    hex
}

#[cfg(test)]
mod tests {
    use super::{Planned, RowChange, Set, quoted};

    #[test]
    fn a_statement_names_all_that_was_planned_with() {
        let planned = Planned {
            store_uuid: "s-1".to_owned(),
            snapshot_id: 7,
            state: "Ready".to_owned(),
            parent_snapshot_id: Some(6),
            install_path: "snapshots/2/3/u".to_owned(),
        };
        let set = Set::Parent { parent_snapshot_id: None, physical_bytes: 99 };
        let change = RowChange { planned: planned.clone(), set };
        let text = change.statement();
        assert!(
            text.contains("SET ref.parent_snapshot_id = 0, ref.physical_size = 99 WHERE store.uuid = 's-1'"),
            "{text}"
        );
        assert!(text.ends_with(
            "ref.snapshot_id = 7 AND ref.state = 'Ready' AND COALESCE(ref.parent_snapshot_id, 0) = 6 AND \
             ref.install_path = 'snapshots/2/3/u'"
        ));
        assert!(!change.is_done(&planned, Some(99)));
        let done = Planned { parent_snapshot_id: None, ..planned };
        assert!(change.is_done(&done, Some(99)) && !change.is_done(&done, Some(98)));
    }

    #[test]
    fn no_text_leaves_its_quotes() {
        assert_eq!(quoted("it's"), "'it''s'");
        assert_eq!(quoted("a\\' OR 1"), "CONVERT(X'615C27204F522031' USING utf8mb4)");
    }
}
