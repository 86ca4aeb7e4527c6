//! A file read once, from beginning to end, for its own digest and for the leaves that lie in it.

use rayon::prelude::*;

use super::{BATCH_READS, BLOCK_LENGTH, Job, Result, Task, hash, place, read};
use crate::digest::leaf;
use crate::ids::Digest;
use crate::qcow2::{Image, ImageError};
use crate::store::chain::OpenChain;

/// How much of the file is held at a time, twice: one part is read while another is hashed.
const WINDOW_BYTES: usize = 16 << 20;
/// How much one thread reads in one go.
const READ_BYTES: usize = 1 << 20;

/// The digest of a whole file, once it was read.
#[derive(Debug, Default)]
pub struct WholeFile {
    /// Its BLAKE3.
    pub digest: Option<Digest>,
}

impl WholeFile {
    /// Reads the file, and hashes the tasks (in the order of the file) that lie in what is read; what lies elsewhere, or
    /// across two windows, is read after.
    pub(super) fn read(
        &mut self,
        chain: &OpenChain,
        image: &Image,
        tasks: &[Task],
        leaves: &mut [Digest],
        job: &Job<'_>,
    ) -> Result<()> {
        let mut left = Vec::new();
        let mut tasks = tasks;
        self.windows(image, job, |at, window| {
            let end = at + window.len() as u64;
            let here = tasks.partition_point(|task| task.host.is_some_and(|host| host.0 < end));
            let (now, rest) = tasks.split_at(here);
            tasks = rest;
            let inside = |task: &Task| {
                let host = task.host.map_or(0, |host| host.0);
                let from = usize::try_from(host.checked_sub(at)?).ok()?;
                window.get(from..from.checked_add(usize::try_from(task.bytes()).ok()?)?)
            };
            let hashed: Vec<Option<Vec<Digest>>> = now
                .par_iter()
                .with_max_len(4)
                .map(|task| Some(inside(task)?.chunks(BLOCK_LENGTH).map(leaf).collect()))
                .collect();
            for (task, hashed) in now.iter().zip(hashed) {
                match hashed {
                    Some(hashed) => place(leaves, std::slice::from_ref(task), &hashed),
                    None => left.push(*task),
                }
            }
        })?;
        left.extend_from_slice(tasks);
        // In pieces of the file that were just read, or put together from it: little in most files.
        if left.len() < BATCH_READS {
            let mut buffer = Vec::new();
            for task in &left {
                let task = std::slice::from_ref(task);
                let hashed = hash(chain, image, task, &mut buffer, job.tolerant)?;
                place(leaves, task, &hashed);
            }
            return Ok(());
        }
        read(chain, image, &left, leaves, job)
    }

    /// Reads the file for its own digest only.
    pub(super) fn read_alone(&mut self, image: &Image, job: &Job<'_>) -> Result<()> {
        self.windows(image, job, |_, _| {})
    }

    /// Gives the file window by window, each while the next one is read and it is hashed itself.
    fn windows(
        &mut self,
        image: &Image,
        job: &Job<'_>,
        mut give: impl FnMut(u64, &[u8]) + Send,
    ) -> Result<()> {
        let length = image.file_length();
        let mut hasher = blake3::Hasher::new();
        let (mut held, mut next) = (Vec::new(), Vec::new());
        let mut at = 0;
        fill(image, 0, length, &mut held)?;
        while !held.is_empty() {
            job.pace.spend(held.len() as u64, job.cancel);
            job.cancel.check().map_err(|_| ImageError::Cancelled { image: image.name().to_owned() })?;
            let after = at + held.len() as u64;
            let (filled, ()) = rayon::join(
                || fill(image, after, length, &mut next),
                || {
                    rayon::join(|| hasher.update_rayon(&held), || give(at, &held));
                },
            );
            filled?;
            job.progress.advance(held.len() as u64);
            at = after;
            std::mem::swap(&mut held, &mut next);
        }
        self.digest = Some(Digest(*hasher.finalize().as_bytes()));
        Ok(())
    }
}

/// Fills a window with what lies at `at`; empty behind the end.
fn fill(image: &Image, at: u64, length: u64, window: &mut Vec<u8>) -> Result<()> {
    let size = usize::try_from(length.saturating_sub(at)).unwrap_or(WINDOW_BYTES).min(WINDOW_BYTES);
    window.resize(size, 0);
    let parts = window.par_chunks_mut(READ_BYTES).enumerate().with_max_len(1);
    parts.try_for_each(|(index, part)| image.read_file(at + (index * READ_BYTES) as u64, part))
}
