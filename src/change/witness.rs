//! A second opinion: QEMU's own compare of a survivor with the old chain, before what is kept of that goes.
//!
//! Both sides are given to `qemu-img compare` as descriptions in which every file is named, so that it opens
//! nothing but members and files that are kept. At idle priority; blocks for as long as it reads.

use std::process::Command;

use serde_json::{Value, json};

use crate::chain::graph::{Key, NodeId};
use crate::change::decided::Decided;
use crate::change::error::{ChangeError, Result};
use crate::change::publication::{Published, has};
use crate::change::record::{Departure, Publication, Purpose};
use crate::change::site::Site;
use crate::ids::StorePath;
use crate::progress::Silent;
use crate::store::scan::{Scan, ScanOptions};

/// Who looks at survivors before old files go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Witness {
    /// Nobody.
    #[default]
    None,
    /// The program `qemu-img`.
    QemuImg,
}

/// What a witness says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// They are the same, or there was nothing to compare.
    Same,
    /// They differ.
    Differs(String),
}

impl Witness {
    /// Compares all survivors of an operation with the old chains that they replaced.
    ///
    /// # Errors
    ///
    /// If the comparison could not be made; nothing may be purged then.
    pub fn compare(self, site: &Site<'_>, decided: &Decided<'_>, published: &[Published]) -> Result<Verdict> {
        let differs_on_purpose = decided.commit().purpose != Purpose::Delete || decided.commit().repairs;
        if self == Self::None || differs_on_purpose {
            return Ok(Verdict::Same);
        }
        let options = ScanOptions { now_ns: 0, settle_ns: 0, caches: &[], progress: &Silent };
        let scan = Scan::run(site.stores, &options)?;
        for (publication, published) in decided.commit().publications.iter().zip(published) {
            let at = site.at(&publication.at)?;
            let unchanged = super::publication::stat(&at, &publication.at.path)?;
            if *published != Published::Done
                || publication.in_place.is_some()
                || !unchanged.is_some_and(|now| publication.is_new(&now))
                || !has(&at, &publication.kept, &publication.old)?
            {
                continue;
            }
            if let Some(difference) = compare_one(site, decided, publication, &scan)? {
                return Ok(Verdict::Differs(format!("{}: {difference}", at.name)));
            }
        }
        Ok(Verdict::Same)
    }
}

/// The difference that QEMU sees, if there is one.
fn compare_one(
    site: &Site<'_>,
    decided: &Decided<'_>,
    publication: &Publication,
    scan: &Scan,
) -> Result<Option<String>> {
    let survivor = site.key(&publication.at)?;
    let Some(id) = scan.graph.find(&survivor) else { return Ok(None) };
    let below: Vec<NodeId> = scan.graph.ancestors(id).unwrap_or_default();
    let mut lower = Value::Null;
    for id in below.iter().rev() {
        let key = &scan.graph.node(*id).key;
        lower = image(site, key.store, &key.path, &lower)?;
    }
    let new = image(site, survivor.store, &survivor.path, &lower)?;
    let mut old = lower;
    let index = decided.commit().publications.iter().position(|one| one == publication);
    // Departures are listed children first: what lies below comes last.
    let merged = decided
        .commit()
        .departures
        .iter()
        .rev()
        .filter(|one| index.is_some_and(|index| one.after.contains(&index)));
    for departure in merged {
        let (store, path) = where_is(site, departure)?;
        old = image(site, store, &path, &old)?;
    }
    old = image(site, survivor.store, &publication.kept, &old)?;
    let failed = |detail: String| ChangeError::Witness { member: publication.at.path.to_string(), detail };
    let output = Command::new("nice")
        .args(["-n", "19", "qemu-img", "compare", "-U"])
        .args([format!("json:{old}"), format!("json:{new}")])
        .output()
        .map_err(|error| failed(error.to_string()))?;
    let said = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    match output.status.code() {
        Some(0) => Ok(None),
        Some(1) => Ok(Some(said(&output.stdout))),
        _ => Err(failed(said(&output.stderr))),
    }
}

/// Where a deleted member's file is: kept, or under its name still.
fn where_is(site: &Site<'_>, departure: &Departure) -> Result<(usize, StorePath)> {
    let at = site.at(&departure.at)?;
    let path = if has(&at, &departure.kept, &departure.mark)? { &departure.kept } else { &departure.at.path };
    Ok((at.key.store, path.clone()))
}

/// One layer as QEMU describes it, with the layer below.
fn image(site: &Site<'_>, store: usize, path: &StorePath, below: &Value) -> Result<Value> {
    let local = site.backend(store)?.local_path(path).ok_or_else(|| {
        let member = site.stores.display(&Key { store, path: path.clone() });
        ChangeError::Witness { member, detail: "the store is no directory of this host".to_owned() }
    })?;
    let file = json!({ "driver": "file", "filename": local.to_string_lossy(), "locking": "off" });
    Ok(json!({ "driver": "qcow2", "file": file, "backing": below }))
}
