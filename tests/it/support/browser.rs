//! A headless Chromium, driven through chromedriver: `WebDriver` is plain JSON over HTTP.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use serde_json::{Value, json};
use tempfile::TempDir;

use super::service::LONG;

/// The keys that are no letters, as `WebDriver` has them.
pub const ENTER: &str = "\u{e007}";
pub const TAB: &str = "\u{e004}";
pub const SPACE: &str = " ";
pub const RIGHT: &str = "\u{e014}";
pub const ESCAPE: &str = "\u{e00c}";

/// A browser with one window; it and its driver end with this.
pub struct Browser {
    driver: Child,
    port: u16,
    session: String,
    home: TempDir,
}

impl Drop for Browser {
    fn drop(&mut self) {
        if !self.session.is_empty() {
            // The browser ends with its session, before its driver is killed. A panic is on already, perhaps.
            let _ = self.request("DELETE", "", None);
        }
        let _ = self.driver.kill();
        let _ = self.driver.wait();
    }
}

impl Browser {
    /// Starts both. They must be there: `scripts/check` installs them.
    pub fn start() -> Self {
        let home = tempfile::tempdir().unwrap();
        let mut driver = Command::new("chromedriver")
            .arg("--port=0")
            .env("HOME", home.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap_or_else(|error| panic!("chromedriver (Debian: chromium-driver): {error}"));
        let lines = BufReader::new(driver.stdout.take().unwrap()).lines();
        let port = lines.map_while(Result::ok).find_map(|line| {
            let (_, port) = line.split_once("successfully on port ")?;
            port.trim_end_matches('.').parse().ok()
        });
        let mut browser = Self { driver, port: 0, session: String::new(), home };
        browser.port = port.unwrap_or_else(|| panic!("chromedriver did not say its port"));
        let options = json!({"args": [
            "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
            format!("--user-data-dir={}", browser.home.path().join("profile").display()),
        ]});
        let wanted = json!({"capabilities": {"alwaysMatch": {
            "browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"},
        }}});
        let made = browser.send("POST", "/session", Some(&wanted)).unwrap_or_else(|error| panic!("{error}"));
        made["sessionId"].as_str().unwrap().clone_into(&mut browser.session);
        browser
    }

    fn send(&self, method: &str, path: &str, body: Option<&Value>) -> Result<Value, String> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).map_err(|error| error.to_string())?;
        stream.set_read_timeout(Some(LONG)).map_err(|error| error.to_string())?;
        let body = body.map(ToString::to_string).unwrap_or_default();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: localhost:{}\r\nConnection: close\r\nContent-Type: application/json\r\n\
             Content-Length: {}\r\n\r\n",
            self.port,
            body.len()
        );
        stream.write_all((head + &body).as_bytes()).map_err(|error| error.to_string())?;
        // chromedriver keeps the connection, whatever it is asked: the body ends by its length.
        let mut answer = BufReader::new(stream);
        let (mut status, mut length) = (String::new(), 0);
        answer.read_line(&mut status).map_err(|error| error.to_string())?;
        loop {
            let mut line = String::new();
            answer.read_line(&mut line).map_err(|error| error.to_string())?;
            match line.trim().to_ascii_lowercase().split_once(':') {
                Some(("content-length", value)) => length = value.trim().parse().unwrap_or(0),
                Some(_) => {}
                None => break,
            }
        }
        let mut body = vec![0; length];
        answer.read_exact(&mut body).map_err(|error| error.to_string())?;
        let value: Value = serde_json::from_slice(&body).map_err(|error| error.to_string())?;
        let value = value["value"].clone();
        if status.contains(" 200 ") { Ok(value) } else { Err(format!("{method} {path}: {value}")) }
    }

    fn request(&self, method: &str, path: &str, body: Option<&Value>) -> Result<Value, String> {
        self.send(method, &format!("/session/{}{path}", self.session), body)
    }

    /// One command of `WebDriver`; its value.
    fn post(&self, path: &str, body: &Value) -> Value {
        self.request("POST", path, Some(body)).unwrap_or_else(|error| panic!("{error}"))
    }

    /// One command of the `DevTools` protocol.
    fn devtools(&self, command: &str, parameters: &Value) -> Value {
        self.post("/goog/cdp/execute", &json!({"cmd": command, "params": parameters}))
    }

    /// Opens an address.
    pub fn open(&self, address: &str) {
        self.post("/url", &json!({"url": address}));
    }

    /// Runs the body of a function in the page; what it returns.
    pub fn run(&self, script: &str) -> Value {
        self.post("/execute/sync", &json!({"script": script, "args": []}))
    }

    /// Waits until an expression is true in the page.
    pub fn wait(&self, expression: &str) {
        let begun = Instant::now();
        while self.run(&format!("return Boolean({expression})")) != true {
            assert!(begun.elapsed() < LONG, "{expression}: {}", self.run("return document.body.innerText"));
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
    }

    /// Types to whatever has the focus.
    pub fn keys(&self, text: &str) {
        let each =
            |key: char| [json!({"type": "keyDown", "value": key}), json!({"type": "keyUp", "value": key})];
        let actions: Vec<Value> = text.chars().flat_map(each).collect();
        self.post("/actions", &json!({"actions": [{"type": "key", "id": "keys", "actions": actions}]}));
    }

    /// Goes with the tabulator to what fits a selector, as somebody without a mouse does.
    pub fn tab_to(&self, selector: &str) {
        for _ in 0..60 {
            if self.run(&format!("return document.activeElement.matches({selector:?})")) == true {
                return;
            }
            self.keys(TAB);
        }
        panic!("the keyboard does not reach {selector}");
    }

    /// The window's width in pixels, and whether the system is dark.
    pub fn look(&self, width: u32, dark: bool) {
        let screen = json!({"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": false});
        self.devtools("Emulation.setDeviceMetricsOverride", &screen);
        let scheme = if dark { "dark" } else { "light" };
        let features = json!({"features": [{"name": "prefers-color-scheme", "value": scheme}]});
        self.devtools("Emulation.setEmulatedMedia", &features);
    }

    /// A picture of the whole page, as `NAME.png`.
    pub fn picture(&self, name: &str) {
        let shot =
            self.devtools("Page.captureScreenshot", &json!({"format": "png", "captureBeyondViewport": true}));
        let bytes = decoded(shot["data"].as_str().unwrap());
        assert!(bytes.starts_with(b"\x89PNG") && bytes.len() > 4096, "{name} is no picture");
        fs::write(pictures().join(format!("{name}.png")), bytes).unwrap();
    }

    /// What the page and the browser complained of since the last call.
    pub fn complaints(&self) -> Vec<String> {
        let found = self.post("/se/log", &json!({"type": "browser"}));
        // Advice is no complaint.
        let lines = found
            .as_array()
            .unwrap()
            .iter()
            .filter(|line| line["level"] != "DEBUG" && line["level"] != "INFO");
        lines.map(|line| line["message"].to_string()).collect()
    }
}

/// Where pictures lie: beside the built program.
fn pictures() -> PathBuf {
    let program = Path::new(env!("CARGO_BIN_EXE_qchain"));
    let directory = program.parent().and_then(Path::parent).unwrap().join("screenshots");
    fs::create_dir_all(&directory).unwrap();
    directory
}

fn decoded(text: &str) -> Vec<u8> {
    let value = |byte: u8| match byte {
        b'A'..=b'Z' => byte - b'A',
        b'a'..=b'z' => byte - b'a' + 26,
        b'0'..=b'9' => byte - b'0' + 52,
        b'+' => 62,
        b'/' => 63,
        other => panic!("{other} is not of base64"),
    };
    let (mut bytes, mut bits, mut held) = (Vec::with_capacity(text.len()), 0_u32, 0_u32);
    for byte in text.trim_end_matches('=').bytes() {
        (bits, held) = (bits << 6 | u32::from(value(byte)), held + 6);
        if held >= 8 {
            held -= 8;
            bytes.push(u8::try_from(bits >> held & 0xff).unwrap());
        }
    }
    bytes
}
