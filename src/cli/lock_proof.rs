//! Whether locks are seen across processes: a second process of this program takes them, this one looks.
//!
//! On some mounts a process sees just its own locks, or none (NFS with `nolock`, some file systems in user
//! space). Where that is so, "nobody has the image open" must not be said because no lock is seen.
//!
//! Bounded in time: a process that does not answer is ended, and its locks count as not seen.

use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use super::error::{CliError, Exit, Result};
use crate::backend::posix::PosixStore;
use crate::backend::{Backend, BackendError, publish};
use crate::ids::StorePath;
use crate::store::StoreError;

/// The hidden command that takes the locks.
pub const COMMAND: &str = "__hold-lock";
/// What it says once it has them.
const HELD: &str = "held";
/// How long an answer, or an end, is waited for.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often is looked whether a process has ended.
const STEP: Duration = Duration::from_millis(5);

/// The arguments of the process that takes the locks.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The file, by its absolute path
    file: PathBuf,
}

/// Takes the locks that keep QEMU's writers out, says so, and holds them until standard input ends.
pub fn hold(args: &Args) -> Result<Exit> {
    let usage = || CliError::usage(format!("{COMMAND} needs the path of a file"));
    let name = args.file.file_name().and_then(|name| name.to_str()).ok_or_else(usage)?;
    let path = StorePath::parse(name).map_err(|_| usage())?;
    let directory = args.file.parent().ok_or_else(usage)?;
    let fail = |source: BackendError| StoreError::Backend { store: directory.display().to_string(), source };
    let file = PosixStore::open(directory).and_then(|store| store.open_writable(&path)).map_err(fail)?;
    let held = file.hold_image_locks().map_err(fail)?;
    if held.is_some() {
        super::output::text(|out| writeln!(out, "{HELD}"))?;
        let input = io::stdin().lock().read_to_end(&mut Vec::new());
        input.map_err(|source| CliError::Read { file: "standard input".to_owned(), source })?;
    }
    Ok(Exit::DONE)
}

/// Whether locks that another process takes on a file in `scratch` are seen here, and seen to go.
pub fn seen_across_processes(backend: &dyn Backend, scratch: &StorePath) -> bool {
    // Told by its name from the temporary files of a change, as those of other probes are.
    let Ok(path) = scratch.join(&format!("probe.{}", publish::temporary_name())) else { return false };
    let seen = prove(backend, &path).unwrap_or_else(|error| {
        tracing::warn!("{}: locks could not be tried out: {error}", backend.describe());
        false
    });
    if let Err(error) = backend.remove_file(&path) {
        // A file of qchain's own, which the next change sweeps.
        tracing::debug!("{path}: {error}");
    }
    seen
}

fn prove(backend: &dyn Backend, path: &StorePath) -> io::Result<bool> {
    let file = backend.create(path).map_err(io::Error::other)?;
    // Not a directory of this host: there is nobody whose locks could be seen.
    let Some(local) = backend.local_path(path) else { return Ok(false) };
    let locked = || file.image_locks().map(|locks| locks.any).map_err(io::Error::other);
    let before = locked()?;
    let Some(holder) = Holder::start(&local)? else { return Ok(false) };
    let during = locked()?;
    drop(holder);
    Ok(!before && during && !locked()?)
}

/// The process that has the locks. Dropping it ends it.
struct Holder(Child);

impl Holder {
    /// Starts it, and waits until it has the locks; `None` if that does not come.
    fn start(file: &Path) -> io::Result<Option<Self>> {
        // What this process runs, also if the file has been replaced by an upgrade since.
        let child = Command::new("/proc/self/exe")
            .arg(COMMAND)
            .arg(file)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        let mut holder = Self(child);
        let Some(output) = holder.0.stdout.take() else { return Ok(None) };
        let (sender, answer) = mpsc::channel();
        // By a thread, as reading from a pipe knows no time limit; it ends with the process.
        std::thread::spawn(move || {
            let mut line = String::new();
            let read = BufReader::new(output).read_line(&mut line);
            // Nobody listens any more if it came too late.
            let _ = sender.send(read.is_ok() && line.trim_end() == HELD);
        });
        let held = answer.recv_timeout(PATIENCE).unwrap_or(false);
        Ok(held.then_some(holder))
    }

    fn ended(&mut self) -> bool {
        let begun = Instant::now();
        while begun.elapsed() < PATIENCE {
            match self.0.try_wait() {
                Ok(None) => std::thread::sleep(STEP),
                Ok(Some(_)) | Err(_) => return true,
            }
        }
        false
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        // The end of its input ends it.
        self.0.stdin.take();
        if !self.ended() {
            // Best effort: one that hangs in a mount ends when that answers.
            let _ = self.0.kill();
            self.ended();
        }
    }
}
