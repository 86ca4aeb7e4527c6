//! Two zones: one that has members, one that copies them; and the line between their services.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use serde_json::Value;

use super::chains::{assert_true, write_truth};
use super::qemu::{must, text};
use super::service::{Served, configure};
use super::world::World;

/// The token of the zone that copies.
pub const PEER: &str = "peer-token-0123456789";

/// A zone whose members are adopted, with the truth of each beside the store.
pub fn giving(world: World, names: &[&str]) -> World {
    assert_eq!(world.run(&["init"]).0, 0);
    for name in names {
        write_truth(&world.member(name), &truth(&world, name));
    }
    adopt(&world);
    world
}

/// A zone whose base has so many MiB that cannot be compressed, and an increment with a hundredth of it.
pub fn random(mebibytes: u64) -> World {
    let world = World::new();
    let data = world.directory.path().join("data");
    let mut bytes = vec![0; usize::try_from(mebibytes << 20).unwrap()];
    blake3::Hasher::new().update(b"noise").finalize_xof().fill(&mut bytes);
    fs::write(&data, &bytes).unwrap();
    let base = world.member("base");
    must("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", text(&data), text(&base)]);
    let inc = world.member("inc");
    must("qemu-img", &["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "base", text(&inc)]);
    let change = data.with_extension("change");
    let mut bytes = vec![0; 65536];
    for step in 0..mebibytes * 16 / 100 {
        blake3::Hasher::new().update(&step.to_le_bytes()).finalize_xof().fill(&mut bytes);
        fs::write(&change, &bytes).unwrap();
        let write = format!("write -q -s {} {} 64k", text(&change), step * 100 * 65536);
        must("qemu-io", &["-f", "qcow2", "-c", &write, text(&inc)]);
    }
    giving(world, &["base", "inc"])
}

/// Adopts all members.
pub fn adopt(world: &World) {
    let (exit, report) = world.run(&["adopt", "--now"]);
    assert_eq!((exit, &report["findings"]), (0, &serde_json::json!([])), "{report}");
}

/// Where the truth of a member lies.
pub fn truth(world: &World, name: &str) -> PathBuf {
    world.directory.path().join(format!("{name}.truth"))
}

/// An empty zone.
pub fn taking() -> World {
    let world = World::new();
    fs::remove_dir_all(world.root().join("snapshots/2")).unwrap();
    assert_eq!(world.run(&["init"]).0, 0);
    world
}

/// Fails unless a zone has these members as the other one had them, all of both sound and adopted, and nothing lies about.
pub fn same_as(taken: &World, given: &World, names: &[&str]) {
    for name in names {
        assert_true(&taken.member(name), &truth(given, name), name);
    }
    for world in [taken, given] {
        let (exit, report) = world.run(&["verify", "--level", "data"]);
        assert_eq!(exit, 0, "{report}");
        let checked = report["checked"].as_array().unwrap();
        assert!(checked.iter().all(|one| one["verdict"] == "sound"), "{report}");
    }
    assert_eq!(temporaries(taken), Vec::<String>::new());
}

/// What lies among a zone's temporaries.
pub fn temporaries(world: &World) -> Vec<String> {
    let entries = fs::read_dir(world.root().join(".qchain/tmp")).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

/// The path of a member.
pub fn path(name: &str) -> String {
    format!("snapshots/2/7/{name}")
}

/// Copies from a directory.
pub fn copy(to: &World, from: &Path, arguments: &[&str]) -> (i32, Value) {
    to.run(&[&["copy", "--from", text(from)], arguments].concat())
}

/// Serves a zone's store, to the peer's token too.
pub fn serve(world: &World, more: &str) -> Served {
    configure(world, more);
    let tokens = world.directory.path().join("tokens");
    let known = fs::read_to_string(&tokens).unwrap();
    fs::write(&tokens, format!("{known}west peer {PEER}\nother peer:9 {PEER}-of-account-9\n")).unwrap();
    Served::start(world)
}

/// Writes a configuration in which the zone `east` is at that URL.
pub fn know(world: &World, url: &str, token: &str, more: &str) {
    let file = world.directory.path().join("east.token");
    fs::write(&file, format!("{token}\n")).unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
    configure(world, &format!("[zones.east]\nurl = {url:?}\ntoken_file = \"{}\"\n{more}", file.display()));
}

/// The command that copies from the zone `east`.
pub fn pull_command(world: &World, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_qchain"));
    command
        .args(["--json", "--config", text(&world.directory.path().join("qchain.toml"))])
        .args(["copy", "--from", "east"])
        .args(arguments)
        .env("XDG_CACHE_HOME", world.directory.path().join("caches"))
        .env_remove("QCHAIN_STORE")
        .env_remove("QCHAIN_CONFIG");
    command
}

/// Copies from the zone `east`.
pub fn pull(world: &World, arguments: &[&str]) -> (i32, Value) {
    let output = pull_command(world, arguments).output().unwrap();
    let document = serde_json::from_slice(&output.stdout);
    let document = document.unwrap_or_else(|error| panic!("{arguments:?}: {error}: {output:?}"));
    (output.status.code().unwrap(), document)
}

/// What becomes of the bytes that come from the server, by how many came before over all connections.
pub type Fate = Box<dyn Fn(u64, &mut Vec<u8>) -> Then + Send + Sync>;

/// What comes after some bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    /// The next ones.
    More,
    /// The end of the connection.
    Cut,
}

/// The line between two services.
pub struct Line {
    shared: Arc<Shared>,
    port: u16,
}

struct Shared {
    target: String,
    fate: Fate,
    delay: Duration,
    came: AtomicU64,
    ended: AtomicBool,
}

impl Line {
    /// To a server; `fate` is asked of all that comes from there, each piece so much later.
    pub fn to(
        target: &str,
        delay: Duration,
        fate: impl Fn(u64, &mut Vec<u8>) -> Then + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let (target, fate) = (target.to_owned(), Box::new(fate));
        let (came, ended) = (AtomicU64::new(0), AtomicBool::new(false));
        let shared = Arc::new(Shared { target, fate, delay, came, ended });
        let passing = shared.clone();
        std::thread::spawn(move || {
            for client in listener.incoming() {
                if passing.ended.load(Ordering::SeqCst) {
                    break;
                }
                let shared = passing.clone();
                std::thread::spawn(move || pass(&shared, client.unwrap()));
            }
        });
        Self { shared, port }
    }

    /// One that only counts.
    pub fn plain(target: &str) -> Self {
        Self::to(target, Duration::ZERO, |_, _| Then::More)
    }

    /// Its URL.
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// How many bytes came from the server.
    pub fn came(&self) -> u64 {
        self.shared.came.load(Ordering::SeqCst)
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::SeqCst);
        // Wakes the listener, which then ends.
        let _ = TcpStream::connect(("127.0.0.1", self.port));
    }
}

fn pass(shared: &Arc<Shared>, client: TcpStream) {
    let Ok(server) = TcpStream::connect(&shared.target) else { return };
    for end in [&client, &server] {
        end.set_nodelay(true).unwrap();
    }
    let (mut up_from, mut up_to) = (client.try_clone().unwrap(), server.try_clone().unwrap());
    std::thread::spawn(move || {
        let _ = std::io::copy(&mut up_from, &mut up_to);
        let _ = up_to.shutdown(Shutdown::Both);
    });
    let (mut from, mut to) = (server, client);
    let mut buffer = vec![0; 64 << 10];
    while let Ok(count) = from.read(&mut buffer) {
        if count == 0 {
            break;
        }
        std::thread::sleep(shared.delay);
        let mut bytes = buffer[..count].to_vec();
        let before = shared.came.fetch_add(count as u64, Ordering::SeqCst);
        let then = (shared.fate)(before, &mut bytes);
        if to.write_all(&bytes).is_err() || then == Then::Cut {
            break;
        }
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}
