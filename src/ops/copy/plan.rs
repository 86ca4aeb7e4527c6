//! What of a line has to come. Pure.

use std::collections::BTreeSet;

use super::offer::LineMember;
use super::peer::wrong;
use crate::cloudstack::paths::{Area, InstallPath};
use crate::digest::block_count;
use crate::digest::table::Shape;
use crate::failure::Code;
use crate::ids::StorePath;
use crate::ops::{OpError, Result};
use crate::qcow2::format::MAX_L1_BYTES;
use crate::store::StoreError;
use crate::store::chain::MAX_DEPTH;
use crate::store::record::OWN_DIRECTORY;
use crate::units::ClusterBits;

/// One account's volume that is another one's here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Renaming {
    from: (u64, u64),
    to: (u64, u64),
}

impl Renaming {
    /// Reads `ACCOUNT/VOLUME=ACCOUNT/VOLUME`.
    pub fn parse(text: &str) -> std::result::Result<Self, String> {
        let one = |text: &str| {
            let (account, volume) = text.split_once('/')?;
            Some((account.parse().ok()?, volume.parse().ok()?))
        };
        let parsed =
            text.split_once('=').and_then(|(from, to)| Some(Self { from: one(from)?, to: one(to)? }));
        parsed.ok_or_else(|| format!("{text:?} is no ACCOUNT/VOLUME=ACCOUNT/VOLUME"))
    }
}

/// Where a member goes here. Outside of qchain's own directory, whatever a peer says; and unless the store is `plain`
/// nowhere but among snapshots: CloudStack takes what lies in its other directories for its own.
pub fn destination(member: &StorePath, renamings: &[Renaming], plain: bool) -> Result<StorePath> {
    let refused = |message: &str| {
        let member = member.to_string();
        OpError::Refused { code: Code::BadName, member, message: message.to_owned() }
    };
    let hidden = member.components().any(|part| part == OWN_DIRECTORY || part.starts_with(".qchain"));
    if hidden || member.is_root() {
        return Err(refused("it would lie among qchain's own files"));
    }
    if !plain && member.components().next() != Some(Area::Snapshots.directory()) {
        return Err(refused("only snapshots are copied to a store of CloudStack"));
    }
    let Some(path) = InstallPath::parse(member).filter(|path| path.area == Area::Snapshots) else {
        return if renamings.is_empty() {
            Ok(member.clone())
        } else {
            Err(refused("only snapshots/ACCOUNT/VOLUME/NAME can get another account and volume"))
        };
    };
    let found = renamings.iter().find(|one| one.from == (path.account, path.owner));
    match found {
        None => Ok(member.clone()),
        Some(one) => {
            let text = format!("{}/{}/{}/{}", Area::Snapshots.directory(), one.to.0, one.to.1, path.file);
            StorePath::parse(&text).map_err(|_| refused("its name here would be too long"))
        }
    }
}

/// What the destination has under a member's name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Nothing.
    Free,
    /// The same view.
    Equal,
    /// Something else, or something of which it is not known what it is: the code, and why.
    Taken(Code, String),
}

/// Which members of a line come, as indices: those from `first` to the end, on `first - 1` if that is not the beginning.
///
/// The newest member that is here with an equal view is what the others are put on, however either side keeps that view.
///
/// # Errors
///
/// `other-view`, or what the standing says, if a name that is needed is taken.
pub fn first_needed(standing: &[Standing], targets: &[StorePath], flatten: bool) -> Result<usize> {
    let equal = standing.iter().rposition(|one| *one == Standing::Equal);
    let last = standing.len().saturating_sub(1);
    let first = match equal {
        Some(at) if !flatten || at == last => at + 1,
        _ if flatten => last,
        _ => 0,
    };
    for (standing, target) in standing.iter().zip(targets).skip(first) {
        if let Standing::Taken(code, message) = standing {
            let (code, member, message) = (*code, target.to_string(), message.clone());
            return Err(OpError::Refused { code, member, message });
        }
    }
    Ok(first)
}

/// Refuses a line that cannot be one, before anything is made of it.
pub fn check_line(peer: &str, line: &[LineMember]) -> Result<()> {
    if line.is_empty() || line.len() > MAX_DEPTH {
        return Err(wrong(peer, format!("it gave a line of {} members", line.len())));
    }
    let mut seen = BTreeSet::new();
    for one in line {
        let shape = Shape { virtual_size: one.virtual_bytes, leaves: one.leaves, runs: one.runs };
        let blocks = block_count(one.virtual_bytes);
        let fits = shape.length() == Some(one.table_bytes) && one.leaves <= blocks && one.runs <= blocks;
        if !fits {
            return Err(wrong(peer, format!("{}: its leaf table cannot have that length", one.member)));
        }
        let covered = ClusterBits::new(one.cluster_bits).map(|bits| bits.bytes() * (bits.bytes() / 8));
        let tables = covered.map(|covered| one.virtual_bytes.div_ceil(covered).saturating_mul(8));
        if tables.is_none_or(|bytes| bytes > MAX_L1_BYTES) {
            return Err(wrong(peer, format!("{}: no image has that size", one.member)));
        }
        if one.name.len() > 4096 || !seen.insert(&one.member) {
            return Err(wrong(peer, format!("{} is in its own line twice", one.member)));
        }
    }
    Ok(())
}

/// A usage error.
pub fn usage(detail: impl Into<String>) -> OpError {
    StoreError::Usage { detail: detail.into() }.into()
}

#[cfg(test)]
mod tests {
    use super::{Renaming, Standing, check_line, destination, first_needed};
    use crate::failure::{Code, Failure as _};
    use crate::ids::{Digest, StorePath};
    use crate::ops::copy::offer::LineMember;

    fn path(text: &str) -> StorePath {
        StorePath::parse(text).unwrap()
    }

    #[test]
    fn the_newest_equal_view_is_built_on() {
        use Standing::{Equal, Free};
        let targets: Vec<StorePath> = ["a", "b", "c", "d"].map(path).into();
        let taken = || Standing::Taken(Code::OtherView, "x".to_owned());
        for (standing, flatten, first) in [
            ([Free, Free, Free, Free], false, 0),
            ([Equal, Free, Equal, Free], false, 3),
            ([Equal, Equal, Equal, Equal], false, 4),
            // What lies below an equal view is not needed, whatever it is.
            ([taken(), Free, Equal, Free], false, 3),
            ([Equal, Free, Free, Free], true, 3),
            ([Free, Free, Free, Equal], true, 4),
        ] {
            assert_eq!(first_needed(&standing, &targets, flatten).unwrap(), first, "{standing:?}");
        }
        let error = first_needed(&[Equal, taken(), Free, Free], &targets, false).unwrap_err();
        assert_eq!((error.code(), error.member()), (Code::OtherView, Some("b")));
    }

    #[test]
    fn volumes_get_other_names() {
        let map = [Renaming::parse("2/7=5/9").unwrap()];
        assert_eq!(destination(&path("snapshots/2/7/x"), &map, false).unwrap(), path("snapshots/5/9/x"));
        assert_eq!(destination(&path("snapshots/2/8/x"), &map, false).unwrap(), path("snapshots/2/8/x"));
        assert!(destination(&path("x"), &map, true).is_err());
        assert_eq!(destination(&path("x"), &[], true).unwrap(), path("x"));
        for hostile in ["template/tmpl/1/4/x", "checkpoints/2/7/x", "x"] {
            assert_eq!(
                destination(&path(hostile), &[], false).unwrap_err().code(),
                Code::BadName,
                "{hostile}"
            );
        }
        for hostile in [".qchain/store.json", "a/.qchain/x", ".qchain-tmp/x"] {
            assert_eq!(
                destination(&path(hostile), &[], true).unwrap_err().code(),
                Code::BadName,
                "{hostile}"
            );
        }
        for bad in ["", "2/7", "2/7=5", "a/b=c/d", "2/7=5/9/1"] {
            assert!(Renaming::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn lines_that_cannot_be_are_refused() {
        let good = LineMember {
            name: "a".to_owned(),
            member: path("a"),
            virtual_bytes: 1 << 20,
            cluster_bits: 16,
            view_digest: Digest([1; 32]),
            table_blake3: Digest([2; 32]),
            table_bytes: 16 + 32 + 16 + 56,
            leaves: 1,
            runs: 1,
        };
        check_line("p", std::slice::from_ref(&good)).unwrap();
        for bad in [
            LineMember { leaves: u64::MAX, ..good.clone() },
            LineMember { runs: 17, table_bytes: 16 + 32 + 17 * 16 + 56, ..good.clone() },
            LineMember { table_bytes: 1, ..good.clone() },
            LineMember { cluster_bits: 70, ..good.clone() },
            LineMember { cluster_bits: 9, virtual_bytes: u64::MAX, ..good.clone() },
        ] {
            assert_eq!(check_line("p", &[bad]).unwrap_err().code(), Code::PeerWrong);
        }
        assert!(check_line("p", &[]).is_err());
        assert!(check_line("p", &[good.clone(), good]).is_err());
    }
}
