//! A test of this binary in a process of its own: for what a process has only once (its user, its memory).

use std::fs;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// How long a process may take for what it is waited for.
const PATIENCE: Duration = Duration::from_mins(2);

/// What the process is asked to do, and on what.
const ASKED: &str = "QCHAIN_TEST_ASKED";

/// The argument, if this process was started for that.
pub fn asked(what: &str) -> Option<String> {
    let asked = std::env::var(ASKED).ok()?;
    asked.strip_prefix(what)?.strip_prefix('=').map(str::to_owned)
}

/// A process to be.
pub struct Forked {
    command: Command,
    test: String,
}

impl Forked {
    /// `test` is the full name of the `#[test]` to run, which calls [`asked`].
    pub fn new(test: &str, what: &str, argument: &str) -> Self {
        let program = std::env::current_exe().unwrap();
        Self::by(Command::new(program), test, what, argument)
    }

    /// The same as another user, without any right but his; `program` is a copy of this binary that he may
    /// run.
    pub fn as_user(program: &str, user: u32, test: &str, what: &str, argument: &str) -> Self {
        let mut command = Command::new("setpriv");
        command.args([
            &format!("--reuid={user}"),
            &format!("--regid={user}"),
            "--clear-groups",
            "--inh-caps=-all",
            program,
        ]);
        Self::by(command, test, what, argument)
    }

    fn by(mut command: Command, test: &str, what: &str, argument: &str) -> Self {
        command.args(["--exact", test, "--nocapture", "--test-threads=1"]);
        command.env(ASKED, format!("{what}={argument}"));
        Self { command, test: test.to_owned() }
    }

    /// Runs it to its end, whatever that is.
    pub fn end(&mut self) -> Output {
        self.command.output().unwrap_or_else(|error| panic!("{:?}: {error}", self.command))
    }

    /// Runs it; it must succeed, and must have been there to run.
    pub fn run(mut self) -> Output {
        let output = self.end();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success() && text.contains("1 passed"), "{}: {text}{errors}", self.test);
        output
    }

    /// Starts it.
    pub fn start(self) -> Running {
        Running::start(self.command)
    }
}

/// Stops the process that calls this, all of its threads, until somebody lets it go on.
pub fn stop_here() {
    kill_process(rustix::process::getpid(), Signal::STOP).unwrap();
}

/// A process that runs. It ends when this goes, if not by itself.
pub struct Running(Child);

impl Running {
    /// Starts a program; what it says is not wanted.
    pub fn start(mut command: Command) -> Self {
        command.stdin(Stdio::null()).stdout(Stdio::null());
        Self(command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}")))
    }

    fn state(&self) -> char {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.0.id())).unwrap_or_default();
        stat.rsplit(") ").next().and_then(|rest| rest.chars().next()).unwrap_or('X')
    }

    /// Waits until it has stopped; false if it ended instead.
    pub fn stopped(&mut self) -> bool {
        let begun = Instant::now();
        loop {
            match self.state() {
                'T' => return true,
                'Z' | 'X' => return false,
                _ => thread::sleep(Duration::from_millis(2)),
            }
            assert!(begun.elapsed() < PATIENCE, "it neither stopped nor ended");
        }
    }

    /// Lets it go on, and waits for its end.
    pub fn go_on(mut self) -> ExitStatus {
        kill_process(Pid::from_child(&self.0), Signal::CONT).unwrap();
        let begun = Instant::now();
        loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                return status;
            }
            assert!(begun.elapsed() < PATIENCE, "it does not end");
            thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
