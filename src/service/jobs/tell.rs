//! How running jobs come along, told from instance to instance: whoever works on one writes that down every few seconds,
//! the others read it. It is worth nothing but to be shown; records and leases decide what is done.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::queue::Entry;
use super::watch::Pulse;
use crate::failure::with_causes;
use crate::ops::OpError;
use crate::service::state::Service;
use crate::store::connect::connect;
use crate::store::jobs::{JobId, JobShelf, JobState};

/// How often it is written and read.
const EVERY: Duration = Duration::from_secs(2);
/// The longest name of a phase that is believed, in bytes.
const LONGEST_PHASE: usize = 200;

/// What is written.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Told {
    /// As in the record: what an earlier owner left says nothing.
    owner: Option<String>,
    progress: Pulse,
}

/// Tells and hears until the service drains.
pub fn tell(service: &Service, _: usize) {
    let mut last = BTreeMap::new();
    while !service.jobs.is_stopped() {
        if let Err(error) = round(service, &mut last) {
            tracing::debug!("how jobs come along is not told: {}", with_causes(&error));
        }
        let begun = Instant::now();
        while begun.elapsed() < EVERY && !service.jobs.is_stopped() {
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

/// `last` has what was written of each job.
fn round(service: &Service, last: &mut BTreeMap<JobId, Pulse>) -> Result<(), OpError> {
    let mut running = service.jobs.all();
    running.retain(|entry| entry.record.state == JobState::Running);
    last.retain(|id, _| running.iter().any(|entry| entry.record.id == *id));
    if running.is_empty() {
        return Ok(());
    }
    let stores = connect(service.config.stores.clone())?;
    for entry in &running {
        let Some((_, store)) = stores.named(&entry.home) else { continue };
        let (shelf, id) = (JobShelf::new(store)?, &entry.record.id);
        let Some(running) = &entry.running else {
            service.jobs.hear(id, heard(&shelf, entry)?);
            continue;
        };
        let progress = running.meter.pulse();
        if last.get(id).is_some_and(|was| was.phase == progress.phase && was.done == progress.done) {
            continue;
        }
        last.insert(id.clone(), progress.clone());
        let told = Told { owner: entry.record.owner.clone(), progress };
        shelf.put_progress(id, &serde_json::to_vec(&told).unwrap_or_default())?;
        // It may have ended meanwhile, and who ended it may have removed the note before it was written.
        if service.jobs.known(id).is_none_or(|entry| entry.record.state.is_over()) {
            shelf.remove_progress(id)?;
        }
    }
    Ok(())
}

/// What the owner of a job told last.
fn heard(shelf: &JobShelf, entry: &Entry) -> Result<Option<Pulse>, OpError> {
    let bytes = shelf.progress(&entry.record.id)?;
    Ok(bytes.and_then(|bytes| decode(&bytes, entry.record.owner.as_deref())))
}

/// Whatever the bytes are, it neither panics nor takes more memory than some times their length.
fn decode(bytes: &[u8], owner: Option<&str>) -> Option<Pulse> {
    let Told { owner: by, progress } = serde_json::from_slice(bytes).ok()?;
    (by.as_deref() == owner && progress.phase.len() <= LONGEST_PHASE).then_some(progress)
}

#[cfg(test)]
mod tests {
    use super::{Told, decode};
    use crate::progress::Progress as _;
    use crate::service::jobs::watch::Meter;

    #[test]
    fn what_was_told_is_heard_of_its_owner_alone() {
        let meter = Meter::default();
        meter.phase("reading", 4 << 20);
        meter.advance(1 << 20);
        let told = Told { owner: Some("host 7".to_owned()), progress: meter.pulse() };
        let bytes = serde_json::to_vec(&told).unwrap();
        assert_eq!(decode(&bytes, Some("host 7")), Some(told.progress));
        assert_eq!((decode(&bytes, Some("host 8")), decode(&bytes, None)), (None, None));
        let text = String::from_utf8(bytes).unwrap();
        for other in
            [text.replace("bytes", "miles"), text.replace("reading", &"x".repeat(300)), "{}".to_owned()]
        {
            assert_eq!(decode(other.as_bytes(), Some("host 7")), None, "{other}");
        }
    }
}
