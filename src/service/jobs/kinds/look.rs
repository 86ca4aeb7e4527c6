//! `verify`, `adopt`, `audit`, `recover`: verbs that can be run again and again.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use super::{Outcome, Work, texts};
use crate::chain::graph::NodeId;
use crate::change::leaving::leaving;
use crate::change::sweep;
use crate::ops::adopt::{self, adopt as adopt_members};
use crate::ops::audit::{AuditOptions, audit as audit_stores};
use crate::ops::recover::{self as recovery, RecoverReport, begin, failure};
use crate::ops::verify::{Level, Options, verify as verify_members};
use crate::ops::{Result, verify};
use crate::service::jobs::request::{AdoptRequest, AuditRequest, RecoverRequest, VerifyRequest};
use crate::service::rows;
use crate::service::view::{now_ns, scan};
use crate::store::StoreError;
use crate::store::caches::Caches;
use crate::store::jobs::JobError;
use crate::store::names::resolve_all;
use crate::store::scan::Scan;

/// How long a file must have been left alone to count as left behind, if nobody says.
const MIN_AGE: Duration = Duration::from_hours(8);

fn deadline(seconds: Option<u32>) -> Option<Instant> {
    seconds.and_then(|seconds| Instant::now().checked_add(Duration::from_secs(seconds.into())))
}

pub fn verify(work: &Work<'_>, request: &VerifyRequest) -> Result<Outcome> {
    let Work { config, stores, .. } = *work;
    let level = Level::from(request.level);
    let usage = |detail: &str| StoreError::Usage { detail: detail.to_owned() };
    let of_data = request.fraction.is_some() || request.max_seconds.or(request.older_than_seconds).is_some();
    if level != Level::Data && of_data {
        return Err(usage("fraction, max_seconds and older_than_seconds are for level data").into());
    }
    if request.fraction.is_some_and(|part| !(part > 0.0 && part <= 1.0)) {
        return Err(usage("fraction is not above 0 and at most 1").into());
    }
    let caches = Caches::load(stores, config.cache.as_deref());
    let scan = scan(config, stores, &caches.loaded, false)?;
    caches.save();
    let names = texts(stores, &request.members)?;
    let mut members: Vec<NodeId> =
        if names.is_empty() { scan.graph.ids().collect() } else { resolve_all(stores, &scan, &names)? };
    let now = now_ns();
    if let Some(seconds) = request.older_than_seconds {
        members = unread(work, &scan, &members, seconds.into(), now)?;
    }
    let pace = work.site.pace.within(request.rate_bytes_per_second.unwrap_or(0));
    let options = Options {
        level,
        fraction: request.fraction,
        seed: u64::from_le_bytes(now.to_le_bytes()),
        deadline: deadline(request.max_seconds),
        note: !config.read_only,
        all: names.is_empty() && level >= Level::Structure,
        now_ns: now,
    };
    let report: verify::VerifyReport =
        verify_members(stores, &scan, &members, &options, work.meter, work.cancel, &pace)?;
    let read_bytes = report.checked.iter().map(|checked| checked.bytes_read).sum();
    Ok(Outcome { read_bytes, ..Outcome::of(&report, None) })
}

/// Those of the members whose bytes were not all read since so many seconds.
fn unread(
    work: &Work<'_>,
    scan: &Scan,
    members: &[NodeId],
    seconds: u64,
    now_ns: i64,
) -> Result<Vec<NodeId>> {
    let debts = verify::debt(work.stores, scan, members, now_ns)?;
    let due = |debt: &&verify::Debt| debt.adopted && debt.age_seconds.is_none_or(|age| age >= seconds);
    let names: BTreeSet<&str> = debts.iter().filter(due).map(|debt| debt.member.as_str()).collect();
    let name = |id: NodeId| work.stores.display(&scan.graph.node(id).key);
    Ok(members.iter().copied().filter(|id| names.contains(name(*id).as_str())).collect())
}

pub fn adopt(work: &Work<'_>, request: &AdoptRequest) -> Result<Outcome> {
    let Work { config, stores, site, .. } = *work;
    let _guard = begin(site, config.witness)?;
    let scan = scan(config, stores, &[], request.now)?;
    let names = texts(stores, &request.members)?;
    let chosen = !names.is_empty();
    let targets = if chosen { resolve_all(stores, &scan, &names)? } else { scan.graph.ids().collect() };
    let wanted = adopt::Request {
        targets,
        named: chosen,
        accept_changed: request.accept_changed,
        jobs: config.jobs,
        leaving: leaving(site, &scan)?,
        now_ns: now_ns(),
        deadline: deadline(request.max_seconds),
    };
    let report = adopt_members(stores, &scan, &wanted, work.meter, work.cancel, &site.pace)?;
    sweep::manifests(site)?;
    let first = report.findings.first();
    let error = report.failure.map(|kind| JobError {
        kind: kind.word().to_owned(),
        code: first.map_or("io", |finding| finding.code.as_str()).to_owned(),
        message: first.map_or_else(|| "not all was adopted".to_owned(), |finding| finding.message.clone()),
        member: first.map(|finding| finding.member.clone()),
    });
    Ok(Outcome::of(&report, error))
}

pub fn audit(work: &Work<'_>, request: &AuditRequest) -> Result<Outcome> {
    let Work { config, stores, .. } = *work;
    let caches = Caches::load(stores, config.cache.as_deref());
    let scan = scan(config, stores, &caches.loaded, false)?;
    let min_age = request.min_age_seconds.map_or(MIN_AGE, |seconds| Duration::from_secs(seconds.into()));
    let records = rows::read(config)?;
    let options = AuditOptions {
        records: records.as_ref(),
        policy: config.policy,
        now_ns: i128::from(now_ns()),
        min_age_ns: i128::try_from(min_age.as_nanos()).unwrap_or(i128::MAX),
    };
    Ok(Outcome::of(&audit_stores(stores, &scan, &options, work.cancel)?, None))
}

pub fn recover(work: &Work<'_>, request: &RecoverRequest) -> Result<Outcome> {
    let Work { config, site, .. } = *work;
    // What an attempt before this one thawed is thawed.
    let thaw = request.thaw.as_deref().filter(|_| !work.again);
    let thawed = thaw.map(|text| recovery::thaw(site, text)).transpose()?;
    let all = recovery::recover(site, config.witness)?;
    let report = RecoverReport::of(site, &all, &[], thawed.as_ref());
    let failed = all.iter().find_map(|one| failure(&one.action));
    let error = failed.map(|(_, body)| JobError {
        kind: body.kind.to_owned(),
        code: body.code.to_owned(),
        message: body.message,
        member: body.member,
    });
    Ok(Outcome::of(&report, error))
}
