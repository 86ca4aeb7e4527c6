//! `copy` over a line that does something to one message: whichever it is and whatever becomes of it, the copy comes to its end
//! by itself, the files are those of an undisturbed one, and hardly more is sent. `QCHAIN_FULL` takes every message, else every case
//! takes one in some, another one each.

use std::collections::BTreeMap;
use std::fs;
use std::sync::Mutex;

use super::support::messages::{At, Damage, Fault, Messages, Side};
use super::support::qemu::text;
use super::support::service::Served;
use super::support::world::World;
use super::support::zones::{PEER, adopt, know, path, pull, random, same_as, serve, taking, temporaries};

const MIB: u64 = 1 << 20;
const NAMES: [&str; 2] = ["base", "inc"];

/// What is copied: a base, its increment, and checkpoint files.
fn east() -> (World, Served) {
    let east = random(12);
    let checkpoints = east.root().join("checkpoints/2/7");
    fs::create_dir_all(&checkpoints).unwrap();
    for (name, parent) in [("base", ""), ("inc", "<parent><name>base</name></parent>")] {
        let xml = format!("<domaincheckpoint><name>{name}</name>{parent}</domaincheckpoint>");
        fs::write(checkpoints.join(name), xml).unwrap();
    }
    adopt(&east);
    let served = serve(&east, "");
    (east, served)
}

/// All bytes of what came.
type Files = BTreeMap<String, Vec<u8>>;

fn files(west: &World) -> Files {
    let places = NAMES.iter().flat_map(|name| [path(name), format!("checkpoints/2/7/{name}")]);
    places.map(|place| (place.clone(), fs::read(west.root().join(place)).unwrap())).collect()
}

/// Copies over a line; the files, what was sent, and the number of exchanges.
fn copied(served: &Served, damage: Option<Damage>) -> (World, Files, u64, usize) {
    let line = Messages::to(&served.address, damage);
    let west = taking();
    know(&west, &line.url(), PEER, "");
    let rows = west.directory.path().join("rows.json");
    let (exit, report) = pull(&west, &["--records-out", text(&rows), &path("inc")]);
    assert_eq!(exit, 0, "{damage:?}: {report}");
    assert_eq!(temporaries(&west), Vec::<String>::new(), "{damage:?}");
    let files = files(&west);
    (west, files, line.came(), line.exchanges())
}

#[test]
fn whatever_becomes_of_any_message() {
    let (east, served) = east();
    let (west, undisturbed, needed, exchanges) = copied(&served, None);
    same_as(&west, &east, &NAMES);
    assert!(needed > 12 * MIB && exchanges > 32, "{needed} bytes in {exchanges} exchanges");
    let inside = [At::Head(1), At::Body(5), At::Body(9), At::Middle, At::End(0)];
    let answers = inside.iter().flat_map(|at| [Fault::Cut(*at), Fault::Corrupt(*at)]);
    let answers =
        answers.chain([Fault::Cut(At::Head(0)), Fault::Corrupt(At::Head(9)), Fault::Repeat, Fault::Delay]);
    let requests = [At::Head(0), At::Head(12), At::Middle, At::End(0)];
    let requests = requests.into_iter().flat_map(|at| [Fault::Cut(at), Fault::Corrupt(at)]);
    let requests = requests.chain([Fault::Repeat, Fault::Delay]);
    let kinds: Vec<(Side, Fault)> = answers
        .map(|fault| (Side::Answer, fault))
        .chain(requests.map(|fault| (Side::Request, fault)))
        // What is lost is waited for.
        .chain([(Side::Answer, Fault::Truncate(At::Middle)), (Side::Answer, Fault::Truncate(At::Head(20)))])
        .collect();
    let every = if std::env::var_os("QCHAIN_FULL").is_some() { 1 } else { 9 };
    let cases = kinds.iter().enumerate().flat_map(|(at, (side, fault))| {
        let every = if matches!(fault, Fault::Truncate(_)) { every * 2 } else { every };
        (at % every..exchanges).step_by(every).map(|exchange| (exchange, *side, *fault))
    });
    let cases: Mutex<Vec<Damage>> = Mutex::new(cases.collect());
    let worst = Mutex::new((needed, None));
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                loop {
                    let Some(damage) = cases.lock().unwrap().pop() else { break };
                    let (_, files, sent, _) = copied(&served, Some(damage));
                    assert!(files == undisturbed, "{damage:?}: other files");
                    assert!(sent * 100 <= needed * 105, "{damage:?}: {sent} bytes were sent of {needed}");
                    let mut worst = worst.lock().unwrap();
                    if sent > worst.0 {
                        *worst = (sent, Some(damage));
                    }
                }
            });
        }
    });
    let (sent, damage) = *worst.lock().unwrap();
    println!("at most {sent} of {needed} bytes, by {damage:?}");
}
