//! An NFSv3 server in this process, which misbehaves on order. It has its files in memory, one root handle, and believes
//! everybody who they are.

mod calls;
mod tree;

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use nfs3_types::nfs3::nfsstat3;
use qchain::backend::nfs3::Nfs3Store;

pub use tree::Tree;

/// The most bytes of one request.
const MOST_BYTES: usize = 2 << 20;

/// Names of a page, each with its cookie, and whether they are the last ones.
pub type Page = (Vec<(Vec<u8>, u64)>, bool);
/// The page that follows a cookie.
pub type Pages = Arc<dyn Fn(u64) -> Page + Send + Sync>;

/// What kind of a server it is.
#[derive(Clone)]
#[expect(clippy::struct_excessive_bools, reason = "each is a bad habit of its own")]
pub struct Manner {
    /// What FSINFO says of one READ and one WRITE.
    pub told: (u32, u32),
    /// How much one of them moves.
    pub most: usize,
    /// How much more than it was asked for a READ gives, and a WRITE says that it took.
    pub more: usize,
    /// Whether FSINFO has hard links.
    pub links: bool,
    /// The longest name, as PATHCONF says.
    pub name_max: u32,
    /// Whether CREATE takes verifiers.
    pub exclusive: bool,
    /// Replies have none of what they may leave out: attributes and handles.
    pub bare: bool,
    /// Whether it has READDIRPLUS, or READDIR alone.
    pub plus: bool,
    /// How often a COMMIT finds that the server was started anew, and lost what was written to the file.
    pub losses: u32,
    /// The names of all directories.
    pub pages: Option<Pages>,
    /// The length of all files, as attributes have it.
    pub length: Option<u64>,
    /// The file id of everything.
    pub same_id: bool,
}

impl Default for Manner {
    fn default() -> Self {
        Self {
            told: (1 << 20, 1 << 20),
            most: 1 << 20,
            more: 0,
            links: true,
            name_max: 255,
            exclusive: true,
            bare: false,
            plus: true,
            losses: 0,
            pages: None,
            length: None,
            same_id: false,
        }
    }
}

/// What becomes of a call.
pub enum Fate {
    /// It is done and answered.
    Pass,
    /// It is done after this.
    Late(Box<dyn FnOnce() + Send>),
    /// It is not done, and answered with this status.
    Answer(nfsstat3),
    /// It is done, and the record of its reply, with the length before it, made into another one.
    Change(Box<dyn Fn(Vec<u8>) -> Vec<u8> + Send>),
}

/// By the procedure, and how often that was called since.
type Chooser = Box<dyn Fn(u32, usize) -> Fate + Send + Sync>;

struct Shared {
    tree: Mutex<Tree>,
    manner: Mutex<Manner>,
    choose: Mutex<Option<Chooser>>,
    /// Procedures, in order.
    calls: Mutex<Vec<u32>>,
    /// Its incarnation.
    verifier: Mutex<u64>,
    ended: AtomicBool,
}

/// It listens as long as this value lives.
pub struct FakeNfs {
    shared: Arc<Shared>,
    port: u16,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap()
}

impl FakeNfs {
    /// Nothing is in its export.
    pub fn start(manner: Manner) -> Self {
        Self::with(Tree::default(), manner)
    }

    /// Its export is a copy of a directory.
    pub fn of(directory: &Path, manner: Manner) -> Self {
        Self::with(Tree::of(directory), manner)
    }

    fn with(tree: Tree, manner: Manner) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let shared = Arc::new(Shared {
            tree: Mutex::new(tree),
            manner: Mutex::new(manner),
            choose: Mutex::default(),
            calls: Mutex::default(),
            verifier: Mutex::new(1),
            ended: AtomicBool::new(false),
        });
        let serving = shared.clone();
        std::thread::spawn(move || {
            for client in listener.incoming() {
                if serving.ended.load(Ordering::SeqCst) {
                    break;
                }
                let shared = serving.clone();
                std::thread::spawn(move || serve(&shared, client.unwrap()));
            }
        });
        Self { shared, port }
    }

    /// The store's URL; calls take two seconds at most, unless `more` says so.
    pub fn url(&self, more: &str) -> String {
        let timeout = if more.contains("timeout") { "" } else { "&timeout=2" };
        format!("nfs://127.0.0.1:{0}/export?mountport={0}{timeout}{more}", self.port)
    }

    pub fn open(&self, more: &str) -> Nfs3Store {
        super::nfs::open(&self.url(more))
    }

    pub fn tree(&self) -> MutexGuard<'_, Tree> {
        lock(&self.shared.tree)
    }

    /// The bytes of a file.
    pub fn bytes(&self, path: &str) -> Vec<u8> {
        let mut tree = self.tree();
        let id = tree.find(path).unwrap_or_else(|status| panic!("{path}: {status}"));
        let (_, length) = tree.file(id).unwrap();
        let length = usize::try_from(*length).unwrap();
        tree.read(id, 0, length).unwrap().0
    }

    /// How it is from now on.
    pub fn be(&self, manner: Manner) {
        *lock(&self.shared.manner) = manner;
    }

    /// What becomes of each call from now on, by its procedure and how often that was called, from 0.
    pub fn choose(&self, choose: impl Fn(u32, usize) -> Fate + Send + Sync + 'static) {
        *lock(&self.shared.choose) = Some(Box::new(choose));
        lock(&self.shared.calls).clear();
    }

    /// The procedures that were called since then.
    pub fn calls(&self) -> Vec<u32> {
        lock(&self.shared.calls).clone()
    }
}

impl Drop for FakeNfs {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::SeqCst);
        // Wakes the listener, which then ends.
        let _ = TcpStream::connect(("127.0.0.1", self.port));
    }
}

/// One request; none if the connection is at its end.
fn request(client: &mut TcpStream) -> Option<Vec<u8>> {
    let mut head = [0; 4];
    client.read_exact(&mut head).ok()?;
    let length = usize::try_from(u32::from_be_bytes(head) & 0x7FFF_FFFF).unwrap();
    assert!(length < MOST_BYTES, "a request of {length} bytes");
    let mut record = vec![0; length];
    client.read_exact(&mut record).ok()?;
    Some(record)
}

fn serve(shared: &Shared, mut client: TcpStream) {
    client.set_nodelay(true).unwrap();
    while let Some(call) = request(&mut client) {
        let reply = calls::answer(shared, &call);
        // Whoever hangs up does so.
        if client.write_all(&reply).is_err() {
            break;
        }
    }
}
