//! `verify`: whether members are sound, by what their headers and tables say, and by what is known of their bytes.
//!
//! - `links`: the header can be read, and the chain below is complete, of the right format, and no circle.
//! - `structure`: the same, and reference counts and tables agree ([`crate::qcow2::check`]); of an adopted member they are what they
//!   were.
//! - `data`: the same, and of an adopted member all bytes that it decides hash to the leaves that were kept, and it
//!   stands on what it was adopted on. What was never adopted is unknown.
//!
//! Damage is data here, not a failure. Where this process may write to a store, what was read and what was found is
//! noted there: the next run goes on with what was left alone for longest, and a damaged member is in quarantine
//! until a look at all of it finds it sound.

mod binding;
mod damage;
mod data;
mod keep;
mod one;

use std::collections::HashMap;
use std::sync::Mutex;
use std::time::Instant;

use rayon::prelude::*;
use serde::Serialize;

use crate::chain::graph::NodeId;
use crate::ops::Result;
use crate::progress::{Cancel, Pace, Progress};
use crate::store::Stores;
use crate::store::manifest::shelf::{self, Known, Shelf};
use crate::store::measure::Job;
use crate::store::scan::{Finding, Scan};
pub use damage::{Damage, HostRange};
pub use keep::Debt;

/// How far to look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// Headers and backing names.
    Links,
    /// Tables and reference counts too.
    Structure,
    /// Every byte against the manifests.
    Data,
}

/// How to verify.
#[derive(Clone, Debug)]
pub struct Options {
    /// How far to look.
    pub level: Level,
    /// Only so much of each member, chosen by chance: above 0, at most 1.
    pub fraction: Option<f64>,
    /// What the chance goes by.
    pub seed: u64,
    /// No more is read after this; what was left alone for longest comes first.
    pub deadline: Option<Instant>,
    /// Note what was read and found on stores that are opted in.
    pub note: bool,
    /// All members are looked at: those that are known and no images any more, too.
    pub all: bool,
    /// The time, nanoseconds since 1970.
    pub now_ns: i64,
}

/// What was found out about a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// Nothing is wrong at this level, in what was read.
    Sound,
    /// It could not be told: being written, not an image, never adopted, or too large for the limits.
    Unknown,
    /// Some of it cannot be read right.
    Damaged,
}

/// One member checked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
pub struct Checked {
    /// The member.
    pub member: String,
    /// How far it was looked at.
    pub level: Level,
    /// What was found.
    pub verdict: Verdict,
    /// Bytes of its view that were read and compared; what is zeros by its tables is not read.
    pub bytes_read: u64,
    /// Whether all was looked at that the level asks for; not with a fraction, or when the time was up.
    pub complete: bool,
}

/// What was checked and found.
#[derive(Clone, Debug, Default, Serialize, utoipa::ToSchema)]
pub struct VerifyReport {
    /// Each member, in the order asked for.
    pub checked: Vec<Checked>,
    /// What is wrong, or worth knowing, by member in the same order.
    pub findings: Vec<Finding>,
    /// The ranges that do not read as they did.
    pub damage: Vec<Damage>,
}

impl VerifyReport {
    /// Whether any member is damaged.
    #[must_use]
    pub fn any_damaged(&self) -> bool {
        self.checked.iter().any(|checked| checked.verdict == Verdict::Damaged)
    }
}

/// What all members are looked at with.
struct Context<'a> {
    stores: &'a Stores,
    scan: &'a Scan,
    shelves: &'a [Shelf],
    options: &'a Options,
    job: Job<'a>,
    /// What is known of members, once it was asked for.
    known: Mutex<HashMap<NodeId, Known>>,
}

/// What a look at one member told.
#[derive(Debug)]
struct Looked {
    verdict: Verdict,
    findings: Vec<Finding>,
    damage: Vec<Damage>,
    bytes_read: u64,
    complete: bool,
    /// The whole view was held against what it was, whatever it stands on now.
    view_proved: bool,
}

impl Context<'_> {
    /// What is known of a member's content.
    fn known(&self, id: NodeId) -> Result<Known> {
        if let Some(known) = self.known.lock().unwrap_or_else(std::sync::PoisonError::into_inner).get(&id) {
            return Ok(known.clone());
        }
        let known = shelf::known(self.stores, self.scan, self.shelves, id)?;
        self.known.lock().unwrap_or_else(std::sync::PoisonError::into_inner).insert(id, known.clone());
        Ok(known)
    }
}

/// Checks members.
pub fn verify(
    stores: &Stores,
    scan: &Scan,
    members: &[NodeId],
    options: &Options,
    progress: &dyn Progress,
    cancel: &Cancel,
    pace: &Pace,
) -> Result<VerifyReport> {
    let data = options.level == Level::Data;
    let shelves = if options.level == Level::Links { Vec::new() } else { Shelf::load_all(stores)? };
    let known = Mutex::default();
    let context = Context {
        stores,
        scan,
        shelves: &shelves,
        options,
        job: Job { progress, cancel, pace, tolerant: true },
        known,
    };
    let mut by_member: HashMap<&str, Vec<&Finding>> = HashMap::new();
    for finding in &scan.findings {
        by_member.entry(&finding.member).or_default().push(finding);
    }
    let one = |id: &NodeId| {
        cancel.check()?;
        let name = stores.display(&scan.graph.node(*id).key);
        let told = by_member.get(name.as_str()).map_or(&[][..], Vec::as_slice);
        let looked = context.look(*id, &name, told)?;
        if !data {
            progress.advance(1);
        }
        Ok((*id, name, looked))
    };
    let mut looked: Vec<(NodeId, String, Looked)> = if data {
        // Each member is read on all processors; those that were left alone for longest come first.
        let bytes = members.iter().filter_map(|id| scan.member(*id)).map(|member| member.stat.length).sum();
        progress.phase("reading", bytes);
        context.by_age(members)?.iter().map(one).collect::<Result<_>>()?
    } else {
        progress.phase("checking", members.len() as u64);
        members.par_iter().map(one).collect::<Result<_>>()?
    };
    context.bind(&mut looked)?;
    if options.note && data {
        for (id, _, looked) in &looked {
            context.note(*id, looked)?;
        }
    }
    let order: HashMap<NodeId, usize> = members.iter().enumerate().map(|(at, id)| (*id, at)).collect();
    looked.sort_by_key(|(id, _, _)| order.get(id).copied());
    let mut report = VerifyReport::default();
    for (_, member, looked) in looked {
        let Looked { verdict, findings, damage, bytes_read, complete, .. } = looked;
        report.checked.push(Checked { member, level: options.level, verdict, bytes_read, complete });
        report.findings.extend(findings);
        report.damage.extend(damage);
    }
    if options.all {
        context.lost(&mut report)?;
    }
    Ok(report)
}

/// How old the reading of each member's bytes is, oldest first. Reads manifests, no images.
pub fn debt(stores: &Stores, scan: &Scan, members: &[NodeId], now_ns: i64) -> Result<Vec<Debt>> {
    let shelves = Shelf::load_all(stores)?;
    let mut debts = members
        .iter()
        .map(|id| {
            let key = &scan.graph.node(*id).key;
            let known = shelf::known(stores, scan, &shelves, *id)?;
            keep::debt_of(stores.get(key.store)?, &stores.display(key), &key.path, &known, now_ns)
        })
        .collect::<Result<Vec<Debt>>>()?;
    debts.sort_by_key(|debt| debt.oldest_ns);
    Ok(debts)
}
