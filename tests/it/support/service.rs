//! The real service on a store that QEMU made, and a small HTTP client.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use super::world::{COLUMNS, World};

/// CloudStack's URL of the store, as the fixtures have it.
pub const URL: &str = "nfs://192.0.2.10/export/secondary";
/// Tokens of each scope.
pub const READ: &str = "read-token-0123456789";
pub const OPERATE: &str = "operate-token-0123456789";
pub const ADMIN: &str = "admin-token-0123456789";
/// How long anything is waited for: only a test that has failed comes to that.
pub const LONG: Duration = Duration::from_mins(1);

/// An answer.
#[derive(Debug)]
pub struct Answer {
    /// The status.
    pub status: u16,
    /// The head, its names in small letters.
    pub head: Vec<(String, String)>,
    /// The body.
    pub body: Vec<u8>,
}

impl Answer {
    /// The body as JSON.
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&self.body)))
    }

    /// A line of the head.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.head.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    /// Asserts the status; gives the JSON.
    pub fn is(&self, status: u16) -> Value {
        assert_eq!(self.status, status, "{}", String::from_utf8_lossy(&self.body));
        self.json()
    }
}

/// A running service; killed at the end, whatever happens.
pub struct Served {
    child: Child,
    /// `address:port`.
    pub address: String,
    _out: BufReader<ChildStdout>,
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Writes tokens and a configuration beside the store.
pub fn configure(world: &World, more: &str) {
    configure_store(world, &format!("path = \"{}\"\nurl = {URL:?}", world.root().display()), more);
}

/// The same with other lines that say where the store is.
pub fn configure_store(world: &World, store: &str, more: &str) {
    let directory = world.directory.path();
    let tokens = directory.join("tokens");
    let hash = blake3::hash(OPERATE.as_bytes()).to_hex();
    let text = format!("mon read {READ}\nssvm operate blake3:{hash} # hashed\nroot admin {ADMIN}\n");
    fs::write(&tokens, text).unwrap();
    fs::set_permissions(&tokens, fs::Permissions::from_mode(0o600)).unwrap();
    let text = format!(
        "[[stores]]\n{store}\n[safety]\nsettle = \"0s\"\nlease = \"2s\"\nreader_grace = \"0s\"\n\
         [server]\ntokens = \"{}\"\n{more}",
        tokens.display()
    );
    fs::write(directory.join("qchain.toml"), text).unwrap();
}

/// Writes rows of members of the one volume beside the store, each with its state; where.
pub fn write_rows(world: &World, members: &[(&str, &str)]) -> PathBuf {
    let line = |(at, (name, state)): (usize, &(&str, &str))| {
        let length = fs::metadata(world.member(name)).map_or(0, |found| found.len());
        let status = if *state == "Hidden" { "Destroyed" } else { "BackedUp" };
        format!(
            "u\t{URL}\tImage\t{}\tx\tn\t2\t7\tKVM\t{status}\t{state}\tsnapshots/2/7/{name}\t{at}\t0\t10485760\t{length}\tNULL\t\
             2026-01-0{} 00:00:00\n",
            at + 1,
            at + 1
        )
    };
    let path = world.directory.path().join("rows.tsv");
    let lines: String = members.iter().enumerate().map(line).collect();
    fs::write(&path, format!("{COLUMNS}\n{lines}")).unwrap();
    path
}

impl Served {
    /// Starts the service on the world's configuration, and waits until it listens.
    pub fn start(world: &World) -> Self {
        Self::start_with(world, &[])
    }

    /// The same with more arguments before the command.
    pub fn start_with(world: &World, arguments: &[&str]) -> Self {
        let directory = world.directory.path();
        let log = fs::OpenOptions::new().create(true).append(true).open(directory.join("log")).unwrap();
        let mut child = Command::new(env!("CARGO_BIN_EXE_qchain"))
            .arg("--config")
            .arg(directory.join("qchain.toml"))
            .args(arguments)
            .args(["serve", "--listen", "127.0.0.1:0"])
            .env("XDG_CACHE_HOME", directory.join("caches"))
            .env_remove("QCHAIN_STORE")
            .env_remove("QCHAIN_CONFIG")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .unwrap();
        let mut out = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        out.read_line(&mut line).unwrap();
        let address = line.trim().split("://").nth(1).map(str::to_owned);
        let log = || fs::read_to_string(directory.join("log")).unwrap();
        let address = address.unwrap_or_else(|| panic!("it does not listen: {line:?} {}", log()));
        Self { child, address, _out: out }
    }

    /// Sends a request.
    pub fn send(&self, method: &str, path: &str, token: &str, body: Option<&Value>) -> Answer {
        let text = body.map(ToString::to_string).unwrap_or_default();
        let kind = if body.is_some() { "Content-Type: application/json\r\n" } else { "" };
        self.send_raw(method, path, &format!("Authorization: Bearer {token}\r\n{kind}"), text.as_bytes())
    }

    /// The same with a head of the test's making.
    pub fn send_raw(&self, method: &str, path: &str, head: &str, body: &[u8]) -> Answer {
        let mut stream = self.connect();
        let length = body.len();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\nContent-Length: {length}\r\n{head}\r\n"
        );
        stream.write_all(head.as_bytes()).unwrap();
        // A server that refuses by the head alone may have closed.
        let _ = stream.write_all(body);
        read(stream)
    }

    /// A bare connection.
    pub fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(LONG)).unwrap();
        stream
    }

    /// `GET` with the token to read.
    pub fn get(&self, path: &str) -> Answer {
        self.send("GET", path, READ, None)
    }

    /// `POST` with the token to operate.
    pub fn post(&self, path: &str, body: &Value) -> Answer {
        self.send("POST", path, OPERATE, Some(body))
    }

    /// Has it move no more than so many bytes a second; 0: as many as it can.
    pub fn limit(&self, rate: u64) {
        let limit = serde_json::json!({"rate_bytes_per_second": rate});
        self.send("PUT", "/v1/limits", ADMIN, Some(&limit)).is(200);
    }

    /// Has a job running at a rate at which it does not come to its end; its id.
    pub fn running(&self, request: &Value) -> String {
        self.limit(200_000);
        let id = self.job(request);
        let moves = |job: &Value| job["state"] == "running" && job["progress"]["phase"].as_str() != Some("");
        self.wait_for(&id, |job| moves(job) || job["state"] == "done");
        id
    }

    /// Makes a job; its id.
    pub fn job(&self, request: &Value) -> String {
        let made = self.post("/v1/jobs", request).is(202);
        made["id"].as_str().unwrap().to_owned()
    }

    /// Waits until a job is over; the job.
    pub fn wait(&self, id: &str) -> Value {
        self.wait_for(id, |job| !matches!(job["state"].as_str(), Some("queued" | "running")))
    }

    /// Waits until a job is as wanted; the job.
    pub fn wait_for(&self, id: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let begun = Instant::now();
        loop {
            let job = self.get(&format!("/v1/jobs/{id}")).is(200);
            if wanted(&job) {
                return job;
            }
            assert!(begun.elapsed() < LONG, "{job}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Makes a job that must be done; its result.
    pub fn do_job(&self, request: &Value) -> Value {
        let job = self.wait(&self.job(request));
        assert_eq!(job["state"], "done", "{job}");
        job["result"].clone()
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Kills it as a power cut would.
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Ends it in good order; how long that took.
    pub fn terminate(mut self) -> Duration {
        let begun = Instant::now();
        self.signal(Signal::TERM);
        let status = self.child.wait().unwrap();
        assert!(status.success(), "{status:?}");
        begun.elapsed()
    }
}

/// Reads a whole answer, to the end of the connection.
pub fn read(stream: impl Read) -> Answer {
    let mut bytes = Vec::new();
    let mut stream = BufReader::new(stream);
    // What was cut off is seen by what is missing.
    let _ = stream.read_to_end(&mut bytes);
    let end = bytes.windows(4).position(|window| window == b"\r\n\r\n");
    let end = end.unwrap_or_else(|| panic!("no answer: {}", String::from_utf8_lossy(&bytes)));
    let text = String::from_utf8(bytes[..end].to_vec()).unwrap();
    let mut lines = text.lines();
    let status = lines.next().and_then(|line| line.split(' ').nth(1)?.parse().ok()).unwrap();
    let head: Vec<(String, String)> = lines
        .filter_map(|line| line.split_once(": "))
        .map(|(key, value)| (key.to_ascii_lowercase(), value.to_owned()))
        .collect();
    let chunked = head.iter().any(|(key, value)| key == "transfer-encoding" && value == "chunked");
    let body = &bytes[end + 4..];
    Answer { status, head, body: if chunked { unchunked(body) } else { body.to_vec() } }
}

fn unchunked(mut bytes: &[u8]) -> Vec<u8> {
    let mut body = Vec::new();
    while let Some(end) = bytes.windows(2).position(|window| window == b"\r\n") {
        let text = std::str::from_utf8(&bytes[..end]).unwrap();
        let length = usize::from_str_radix(text, 16).unwrap();
        if length == 0 {
            break;
        }
        body.extend_from_slice(&bytes[end + 2..end + 2 + length]);
        bytes = &bytes[end + 4 + length..];
    }
    body
}

/// A member is sound, and reads as it did.
pub fn same(member: &std::path::Path, truth: &std::path::Path) {
    super::chains::assert_true(member, truth, &member.display().to_string());
}
