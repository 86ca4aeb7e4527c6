//! A test of this binary in a process of its own: for what a process has only once (its user, its memory).

use std::process::{Command, Output};

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
}
