//! A network between a client and a server, in this process: slower, cut, or silent, at a call's choice.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// What happens to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It reaches the server.
    Pass,
    /// The connection is cut before it does.
    CutBefore,
    /// It is answered with this status (of NFS), without the server.
    Answer(u32),
    /// It does, and the connection is cut before the answer.
    CutAfter,
    /// It does, the answer is lost, and the connection stays.
    Swallow,
    /// It is lost, and the connection stays.
    Lose,
}

/// The most bytes of one request.
const MOST_BYTES: usize = 2 << 20;

type Chooser = Box<dyn Fn(usize, u32) -> Fate + Send + Sync>;

/// How it is now.
struct Line {
    target: u16,
    delay_us: AtomicU64,
    requests: AtomicUsize,
    choose: Mutex<Option<Chooser>>,
    ended: AtomicBool,
}

/// It listens as long as this value lives.
pub struct Proxy {
    line: Arc<Line>,
    port: u16,
}

impl Proxy {
    /// Listens, and passes everything on to a port of this host.
    pub fn start(target: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let line = Arc::new(Line {
            target,
            delay_us: AtomicU64::new(0),
            requests: AtomicUsize::new(0),
            choose: Mutex::default(),
            ended: AtomicBool::new(false),
        });
        let passing = line.clone();
        std::thread::spawn(move || {
            for client in listener.incoming() {
                if passing.ended.load(Ordering::SeqCst) {
                    break;
                }
                let line = passing.clone();
                std::thread::spawn(move || serve(&line, client.unwrap()));
            }
        });
        Self { line, port }
    }

    /// Where it listens.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// How much later each request arrives from now on.
    pub fn delay(&self, delay: Duration) {
        self.line.delay_us.store(u64::try_from(delay.as_micros()).unwrap(), Ordering::SeqCst);
    }

    /// What becomes of each request from now on, by its number from 0.
    pub fn choose(&self, choose: impl Fn(usize) -> Fate + Send + Sync + 'static) {
        self.choose_by(move |number, _| choose(number));
    }

    /// The same, also by its procedure of NFS.
    pub fn choose_by(&self, choose: impl Fn(usize, u32) -> Fate + Send + Sync + 'static) {
        *self.line.choose.lock().unwrap() = Some(Box::new(choose));
        self.line.requests.store(0, Ordering::SeqCst);
    }

    /// How many requests there were since then.
    pub fn requests(&self) -> usize {
        self.line.requests.load(Ordering::SeqCst)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.line.ended.store(true, Ordering::SeqCst);
        // Wakes the listener, which then ends.
        let _ = TcpStream::connect(("127.0.0.1", self.port));
    }
}

/// The reply to a call that did not do it.
fn answer(call: &[u8], status: u32) -> Vec<u8> {
    let xid = u32::from_be_bytes(call[4..8].try_into().unwrap());
    // Reply, accepted, no verifier, done: what follows is the procedure's own.
    let mut words = vec![xid, 1, 0, 0, 0, 0, status];
    words.resize(words.len() + left_out(procedure(call)), 0);
    let head = (1_u32 << 31) + u32::try_from(4 * words.len()).unwrap();
    words.insert(0, head);
    words.into_iter().flat_map(u32::to_be_bytes).collect()
}

/// How many words say that a refusal tells nothing of attributes: none, those of one object, before and after, of two
/// objects.
pub fn left_out(procedure: u32) -> usize {
    match procedure {
        0 | 1 => 0,
        2 | 7..=13 | 21 => 2,
        14 => 4,
        15 => 3,
        _ => 1,
    }
}

/// The procedure of a call of NFS.
fn procedure(call: &[u8]) -> u32 {
    u32::from_be_bytes(call[24..28].try_into().unwrap())
}

/// One request with its length; none if the connection is at its end.
fn request(client: &mut TcpStream) -> Option<Vec<u8>> {
    let mut head = [0; 4];
    client.read_exact(&mut head).ok()?;
    let length = usize::try_from(u32::from_be_bytes(head) & 0x7FFF_FFFF).unwrap();
    assert!((24..MOST_BYTES).contains(&length), "a request of {length} bytes");
    let mut record = head.to_vec();
    record.resize(4 + length, 0);
    client.read_exact(&mut record[4..]).ok()?;
    Some(record)
}

fn serve(line: &Arc<Line>, mut client: TcpStream) {
    // Nobody there: as if it had been refused.
    let Ok(mut server) = TcpStream::connect(("127.0.0.1", line.target)) else { return };
    client.set_nodelay(true).unwrap();
    server.set_nodelay(true).unwrap();
    let [silenced, swallowed] = [(); 2].map(|()| Arc::new(AtomicBool::new(false)));
    let (mut from, mut to) = (server.try_clone().unwrap(), client.try_clone().unwrap());
    let (silent, swallow) = (silenced.clone(), swallowed.clone());
    std::thread::spawn(move || {
        let mut buffer = vec![0; 1 << 20];
        while let Ok(count) = from.read(&mut buffer) {
            if swallow.load(Ordering::SeqCst) && count > 0 {
                continue;
            }
            if count == 0 || silent.load(Ordering::SeqCst) || to.write_all(&buffer[..count]).is_err() {
                break;
            }
        }
        let _ = to.shutdown(Shutdown::Both);
    });
    while let Some(call) = request(&mut client) {
        let number = line.requests.fetch_add(1, Ordering::SeqCst);
        let fate = line
            .choose
            .lock()
            .unwrap()
            .as_ref()
            .map_or(Fate::Pass, |choose| choose(number, procedure(&call)));
        std::thread::sleep(Duration::from_micros(line.delay_us.load(Ordering::SeqCst)));
        match fate {
            Fate::Lose => continue,
            Fate::Answer(status) => {
                if client.write_all(&answer(&call, status)).is_err() {
                    break;
                }
                continue;
            }
            Fate::CutBefore => break,
            Fate::CutAfter => silenced.store(true, Ordering::SeqCst),
            Fate::Swallow => swallowed.store(true, Ordering::SeqCst),
            Fate::Pass => {}
        }
        if server.write_all(&call).is_err() {
            break;
        }
    }
    let _ = server.shutdown(Shutdown::Both);
    let _ = client.shutdown(Shutdown::Both);
}
