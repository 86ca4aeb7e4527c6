//! `copy` while somebody takes away, or exchanges, what the member that comes stands on: before any call of it.

use std::fs;
use std::sync::Arc;

use qchain::backend::faulty::{Call, Faulty};
use qchain::backend::posix::PosixStore;
use qchain::change::{Site, SystemClock};
use qchain::failure::{Code, Failure as _};
use qchain::ops::copy::{CopyReport, Destination, LocalPeer, Request, copy};
use qchain::ops::{Result, Work};
use qchain::progress::{Cancel, Pace, Silent};

use super::support::chains::assert_true;
use super::support::qemu::{must, text};
use super::support::store::{LEASE, open, open_with, scan};
use super::support::world::World;
use super::support::zones::{copy as copy_by_command, giving, path, taking, truth};

/// Copies `b` into a zone.
fn bring(east: &World, west: &World, backend: Arc<Faulty>) -> Result<CopyReport> {
    let stores = open_with(&west.root(), backend);
    let cancel = Cancel::default();
    let site = Site::new(&stores, &SystemClock, &cancel, LEASE);
    let peer = LocalPeer::new("east".to_owned(), open(&east.root()));
    let request = Request { members: vec![path("b")], ..Request::default() };
    let work = Work { progress: &Silent, cancel: &cancel, pace: &Pace::new(0) };
    copy(&peer, &Destination { site: &site, store: 0 }, &request, &|| Ok(scan(&stores)), &work)
}

fn backend(west: &World) -> Arc<Faulty> {
    Arc::new(Faulty::new(Arc::new(PosixStore::open(&west.root()).unwrap())))
}

/// The zone has `a`, adopted, and nothing of `b`.
fn reset(east: &World, west: &World) {
    for name in ["a", "b"] {
        // What is not there needs not go.
        let _ = fs::remove_file(west.member(name));
    }
    let (exit, report) = copy_by_command(west, &east.root(), &[&path("a")]);
    assert_eq!(exit, 0, "{report}");
}

/// How many mutating calls are made before what `b` stands on is looked at for the last time.
fn decisive(trace: &[Call]) -> u64 {
    let named = |call: &Call| call.mutation.is_some() && call.path.as_str() == path("b");
    let named = trace.iter().rposition(named).unwrap();
    let looked = |call: &Call| call.name == "stat" && call.path.as_str() == path("a");
    let looked = named + trace[named..].iter().position(looked).unwrap();
    trace[..looked].iter().filter(|call| call.mutation.is_some()).count() as u64
}

#[test]
fn what_a_member_stands_on_may_go_at_any_call() {
    let east = World::new();
    east.make("a", "", &["write -P 1 0 192k"]);
    east.make("b", "a", &["write -P 2 64k 64k", "write -z 128k 64k"]);
    let east = giving(east, &["a", "b"]);
    let west = taking();
    reset(&east, &west);
    let clean = backend(&west);
    bring(&east, &west, clean.clone()).unwrap();
    let (calls, decisive) = (clean.mutations(), decisive(&clean.trace()));
    assert!(decisive > 30 && decisive < calls, "{decisive} of {calls}");
    let other = west.directory.path().join("other");
    let (mut again, mut refused) = (0, 0);
    for at in 0..calls {
        for exchange in [false, true] {
            reset(&east, &west);
            let backend = backend(&west);
            let (member, other) = (west.member("a"), other.clone());
            backend.before_mutation(at, move || {
                if exchange {
                    must("qemu-img", &["create", "-q", "-f", "qcow2", text(&other), "192k"]);
                    fs::rename(&other, &member).unwrap();
                } else {
                    fs::remove_file(&member).unwrap();
                }
            });
            let tried = backend.clone();
            let done = bring(&east, &west, backend);
            match done {
                // Whoever takes it away later takes it from a member that is there.
                Ok(_) if at >= self::decisive(&tried.trace()) => {}
                Ok(report) => {
                    assert!(!exchange, "{at}: it stands on another one than it was made for");
                    assert!(west.member("a").exists(), "{at}: {report:?}");
                    assert_true(&west.member("b"), &truth(&east, "b"), "b");
                    again += 1;
                }
                Err(error) => {
                    assert!(!west.member("b").exists(), "{at} {exchange}: {error}");
                    let codes = [Code::ChangedMeanwhile, Code::OtherView, Code::NotAdopted, Code::NotFound];
                    assert!(codes.contains(&error.code()), "{at} {exchange}: {error}");
                    refused += 1;
                }
            }
        }
    }
    assert!(again > 20 && refused > 20, "{again} went on, {refused} were refused");
}
