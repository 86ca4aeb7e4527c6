//! A real NFS server: nfs-ganesha, with a directory as its one export.
//!
//! It registers itself with an rpcbind or does not start. Theirs has a network of its own, so that nothing listens on
//! port 111, and both have an empty `/run` of their own: several servers can run side by side, and all that they
//! write there goes with them, however they end. (`scripts/lib/nfs.sh` does the same.)

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use qchain::backend::nfs3::{Nfs3Store, NfsUrl};
use qchain::backend::{Backend as _, FileKind};
use qchain::ids::StorePath;
use tempfile::TempDir;

use super::qemu::text;

/// How long a server may take to start.
const PATIENCE: Duration = Duration::from_mins(1);

const CONFIGURATION: &str = include_str!("../../../scripts/lib/ganesha.conf");

/// What is done in a view of the file system of its own. The shell is the first process of its kind, and takes all
/// others with it; rpcbind, which becomes another user, would outlive a test that is killed.
const PRIVATE: &str =
    "mount -t tmpfs -o mode=755 tmpfs /run && mkdir /run/rpcbind /run/ganesha && mkdir -p /var/lib/nfs &&
    mount -t tmpfs -o mode=755 tmpfs /var/lib/nfs && { unshare --net rpcbind -f & wait; }";

/// A server; it ends with this value, or with the thread that made it.
#[derive(Debug)]
pub struct Ganesha {
    place: TempDir,
    directory: PathBuf,
    rpcbind: Child,
    server: Option<Child>,
    port: u16,
    mount_port: u16,
    terms: Terms,
}

/// What clients may do, in the server's words.
#[derive(Clone, Copy, Debug)]
pub struct Terms {
    pub access: &'static str,
    pub squash: &'static str,
}

impl Default for Terms {
    /// Everything.
    fn default() -> Self {
        Self { access: "RW", squash: "No_Root_Squash" }
    }
}

/// A port that was free a moment ago.
pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn log(place: &Path, name: &str) -> Stdio {
    fs::File::options().create(true).append(true).open(place.join(name)).unwrap().into()
}

impl Ganesha {
    /// Starts one that exports a directory as `/export`.
    pub fn start(directory: &Path) -> Arc<Self> {
        Arc::new(Self::start_alone(directory))
    }

    /// The same, to be killed and started again.
    pub fn start_alone(directory: &Path) -> Self {
        Self::start_on(directory, Terms::default())
    }

    /// The same, on other terms.
    pub fn start_on(directory: &Path, terms: Terms) -> Self {
        let place = tempfile::tempdir().unwrap();
        let rpcbind = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "unshare", "--mount", "--propagation", "slave"])
            .args(["--pid", "--fork", "--kill-child=KILL", "sh", "-c", PRIVATE])
            .stdin(Stdio::null())
            .stdout(log(place.path(), "rpcbind.out"))
            .stderr(log(place.path(), "rpcbind.out"))
            .spawn()
            .unwrap_or_else(|error| panic!("setpriv: {error}"));
        let socket = format!("/proc/{}/root/run/rpcbind.sock", rpcbind.id());
        let begun = Instant::now();
        while !Path::new(&socket).exists() {
            assert!(begun.elapsed() < PATIENCE, "rpcbind does not start");
            std::thread::sleep(Duration::from_millis(20));
        }
        std::thread::sleep(Duration::from_millis(100));
        let directory = directory.to_owned();
        let mut server = Self { place, directory, rpcbind, server: None, port: 0, mount_port: 0, terms };
        // Somebody else may take a port between the look and the start.
        for _ in 0..5 {
            (server.port, server.mount_port) = (free_port(), free_port());
            if server.try_start() {
                return server;
            }
            server.kill();
        }
        let logged = |name| fs::read_to_string(server.place.path().join(name)).unwrap_or_default();
        panic!("the server does not start: {}{}", logged("ganesha.out"), logged("ganesha.log"));
    }

    fn try_start(&mut self) -> bool {
        let place = self.place.path();
        let configuration = CONFIGURATION
            .replace("@PORT@", &self.port.to_string())
            .replace("@MOUNT_PORT@", &self.mount_port.to_string())
            .replace("@DIRECTORY@", text(&self.directory))
            .replace("@ACCESS@", self.terms.access)
            .replace("@SQUASH@", self.terms.squash);
        fs::write(place.join("ganesha.conf"), configuration).unwrap();
        let namespace = format!("--mount=/proc/{}/ns/mnt", self.rpcbind.id());
        let file = |name| place.join(name);
        let server = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "nsenter", &namespace, "ganesha.nfsd", "-F", "-N", "NIV_EVENT"])
            .args(["-f", text(&file("ganesha.conf")), "-p", text(&file("ganesha.pid"))])
            .args(["-L", text(&file("ganesha.log"))])
            .stdin(Stdio::null())
            .stdout(log(place, "ganesha.out"))
            .stderr(log(place, "ganesha.out"))
            .spawn()
            .unwrap_or_else(|error| panic!("setpriv: {error}"));
        let server = self.server.insert(server);
        let begun = Instant::now();
        while TcpStream::connect(("127.0.0.1", self.port)).is_err() {
            if begun.elapsed() > PATIENCE || server.try_wait().unwrap().is_some() {
                return false;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        true
    }

    /// Where it listens.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Where its mount service listens.
    pub fn mount_port(&self) -> u16 {
        self.mount_port
    }

    /// The store's URL, with more options if there are any (`&uid=...`).
    pub fn url(&self, more: &str) -> String {
        self.url_by(self.port, more)
    }

    /// The URL by way of another port.
    pub fn url_by(&self, port: u16, more: &str) -> String {
        format!("nfs://127.0.0.1:{port}/export?mountport={}{more}", self.mount_port)
    }

    /// The URL of a directory of the export.
    pub fn url_of(&self, below: &str, more: &str) -> String {
        self.url(more).replacen("/export", &format!("/export/{below}"), 1)
    }

    /// Opens it as a store.
    pub fn open(&self, more: &str) -> Nfs3Store {
        open(&self.url(more))
    }

    /// Ends the server at once, as a crash does.
    pub fn kill(&mut self) {
        if let Some(mut server) = self.server.take() {
            server.kill().unwrap();
            server.wait().unwrap();
        }
    }

    /// Starts it again where it was.
    pub fn restart(&mut self) {
        assert!(self.try_start(), "the server does not start again");
    }

    /// Stops it, and waits until all of it stands still.
    pub fn stop(&self) {
        self.signal("STOP");
        let tasks = format!("/proc/{}/task", self.server.as_ref().unwrap().id());
        let begun = Instant::now();
        let stands = |task: fs::DirEntry| {
            // One that has ended meanwhile stands still, too.
            let stat = fs::read_to_string(task.path().join("stat")).unwrap_or_default();
            stat.rsplit(')').next().is_none_or(|rest| rest.is_empty() || rest.starts_with(" T"))
        };
        while !fs::read_dir(&tasks).unwrap().all(|task| stands(task.unwrap())) {
            assert!(begun.elapsed() < PATIENCE, "the server does not stop");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Lets it go on.
    pub fn go_on(&self) {
        self.signal("CONT");
    }

    fn signal(&self, signal: &str) {
        let server = self.server.as_ref().unwrap();
        super::qemu::must("kill", &["-s", signal, &server.id().to_string()]);
    }
}

impl Drop for Ganesha {
    fn drop(&mut self) {
        for process in self.server.iter_mut().chain([&mut self.rpcbind]) {
            // Nothing of them is needed any more.
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

/// Opens a store.
pub fn open(url: &str) -> Nfs3Store {
    Nfs3Store::open(&NfsUrl::parse(url).unwrap()).unwrap_or_else(|error| panic!("{url}: {error}"))
}

/// Removes all that is in a store, by the server: what is removed behind its back it keeps open, with its space.
pub fn clear(url: &str) {
    let store = open(url);
    for entry in store.walk(&StorePath::root(), 64, &|_| false).into_iter().rev() {
        let entry = entry.unwrap();
        let path = entry.path.unwrap();
        let gone = if entry.kind == FileKind::Directory {
            store.remove_dir(&path)
        } else {
            store.remove_file(&path)
        };
        gone.unwrap();
    }
}
