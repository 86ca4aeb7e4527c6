//! How chains should be, by the configuration: `audit` tells which are not so, `consolidate` makes them so.

use std::time::{Duration, UNIX_EPOCH};

use crate::cloudstack::paths::SNAPSHOTS;
use crate::cloudstack::records::Row;
use crate::store::Stores;
use crate::store::record::StoreKind;
use crate::store::scan::Member;

/// How chains should be; 0 is no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// The most members of a chain, its full base among them.
    pub max_length: usize,
    /// How old a full base may be.
    pub max_base_age: Duration,
    /// The most bytes that deleted members of a chain hold.
    pub max_pinned_bytes: u64,
}

/// When a member was made, nanoseconds since 1970: by its row, else by its last change, which a merge makes new.
#[must_use]
pub fn created_ns(row: Option<&Row>, member: &Member) -> i128 {
    let created = row.and_then(|row| {
        let time = humantime::parse_rfc3339_weak(row.created.as_deref()?).ok()?;
        i128::try_from(time.duration_since(UNIX_EPOCH).ok()?.as_nanos()).ok()
    });
    created.unwrap_or(member.stat.modified_ns)
}

/// Whether a member is a snapshot that chains are made of: no template, volume or temporary.
#[must_use]
pub fn is_snapshot(stores: &Stores, member: &Member) -> bool {
    let plain = stores.get(member.key.store).is_ok_and(|store| store.kind() == StoreKind::Plain);
    !member.temporary && (plain || member.key.path.components().next() == Some(SNAPSHOTS))
}
