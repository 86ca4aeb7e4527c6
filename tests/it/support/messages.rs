//! A line between two services that knows where messages begin and end, and does something to one of them.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

/// Which message of an exchange.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// What is asked.
    Request,
    /// What is answered.
    Answer,
}

/// Where in a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum At {
    /// So many bytes behind its beginning.
    Head(usize),
    /// So many bytes behind the beginning of its body.
    Body(usize),
    /// So many bytes before its end.
    End(usize),
    /// In its middle.
    Middle,
}

/// What becomes of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The connection ends there.
    Cut(At),
    /// A bit there is another.
    Corrupt(At),
    /// It comes twice.
    Repeat,
    /// It comes late.
    Delay,
    /// What is behind that is lost, and the connection stays.
    Truncate(At),
}

/// Which message it is, by the number of its exchange, and what becomes of it.
pub type Damage = (usize, Side, Fault);

/// It listens as long as this value lives.
pub struct Messages {
    shared: Arc<Shared>,
    port: u16,
}

struct Shared {
    target: String,
    damage: Option<Damage>,
    exchanges: AtomicUsize,
    came: AtomicU64,
    ended: AtomicBool,
}

impl Messages {
    /// To a server.
    pub fn to(target: &str, damage: Option<Damage>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let (exchanges, came, ended) = Default::default();
        let shared = Arc::new(Shared { target: target.to_owned(), damage, exchanges, came, ended });
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

    /// Its URL.
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// How many bytes the server sent: all of each answer, also of one that was cut.
    pub fn came(&self) -> u64 {
        self.shared.came.load(Ordering::SeqCst)
    }

    /// How many exchanges there were.
    pub fn exchanges(&self) -> usize {
        self.shared.exchanges.load(Ordering::SeqCst)
    }
}

impl Drop for Messages {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::SeqCst);
        // Wakes the listener, which then ends.
        let _ = TcpStream::connect(("127.0.0.1", self.port));
    }
}

/// A message, and how long its head is.
struct Message {
    bytes: Vec<u8>,
    head: usize,
}

/// Reads one by the length that it tells; none where the connection ends.
fn read(from: &mut TcpStream, kept: &mut Vec<u8>) -> Option<Message> {
    let mut buffer = vec![0; 256 << 10];
    let mut wanted = None;
    loop {
        if wanted.is_none()
            && let Some(end) = kept.windows(4).position(|window| window == b"\r\n\r\n")
        {
            let head = String::from_utf8_lossy(&kept[..end]).to_ascii_lowercase();
            let length = head.lines().find_map(|line| line.strip_prefix("content-length:"));
            wanted = Some((end + 4, length.map_or(0, |length| length.trim().parse().unwrap())));
        }
        if let Some((head, length)) = wanted
            && kept.len() >= head + length
        {
            let rest = kept.split_off(head + length);
            return Some(Message { bytes: std::mem::replace(kept, rest), head });
        }
        let count = from.read(&mut buffer).ok().filter(|count| *count > 0)?;
        kept.extend_from_slice(&buffer[..count]);
    }
}

/// Gives a message on, or what becomes of it; whether the connection stays.
fn give(to: &mut TcpStream, mut message: Message, fault: Option<Fault>) -> bool {
    let last = message.bytes.len().saturating_sub(1);
    let place = |at| match at {
        At::Head(at) => at.min(last),
        At::Body(at) => (message.head + at).min(last),
        At::End(before) => last.saturating_sub(before),
        At::Middle => last / 2,
    };
    match fault {
        None => to.write_all(&message.bytes).is_ok(),
        Some(Fault::Cut(at)) => {
            let _ = to.write_all(&message.bytes[..place(at)]);
            false
        }
        Some(Fault::Truncate(at)) => to.write_all(&message.bytes[..place(at)]).is_ok(),
        Some(Fault::Corrupt(at)) => {
            let at = place(at);
            message.bytes[at] ^= 1;
            to.write_all(&message.bytes).is_ok()
        }
        Some(Fault::Repeat) => to.write_all(&message.bytes).is_ok() && to.write_all(&message.bytes).is_ok(),
        Some(Fault::Delay) => {
            std::thread::sleep(Duration::from_millis(500));
            to.write_all(&message.bytes).is_ok()
        }
    }
}

fn pass(shared: &Shared, mut client: TcpStream) {
    let Ok(mut server) = TcpStream::connect(&shared.target) else { return };
    for end in [&client, &server] {
        end.set_nodelay(true).unwrap();
    }
    let (mut asked, mut answered) = (Vec::new(), Vec::new());
    while let Some(request) = read(&mut client, &mut asked) {
        let number = shared.exchanges.fetch_add(1, Ordering::SeqCst);
        let fault = |side| {
            shared.damage.filter(|(at, of, _)| (*at, *of) == (number, side)).map(|(_, _, fault)| fault)
        };
        if !give(&mut server, request, fault(Side::Request)) {
            break;
        }
        // Whoever is asked twice answers twice.
        let answers = if fault(Side::Request) == Some(Fault::Repeat) { 2 } else { 1 };
        let mut stays = true;
        for _ in 0..answers {
            let Some(answer) = read(&mut server, &mut answered) else {
                stays = false;
                break;
            };
            shared.came.fetch_add(answer.bytes.len() as u64, Ordering::SeqCst);
            stays = stays && give(&mut client, answer, fault(Side::Answer));
        }
        if !stays {
            break;
        }
    }
    let _ = server.shutdown(Shutdown::Both);
    let _ = client.shutdown(Shutdown::Both);
}
