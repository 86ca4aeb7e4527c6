//! QEMU's own programs as oracles. A missing program fails the test.

use std::io::{Read, Write};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

/// Runs a program to its end; panics if there is none of that name.
pub fn run(program: &str, arguments: &[&str]) -> Output {
    Command::new(program)
        .args(arguments)
        .env("LC_ALL", "C")
        .output()
        .unwrap_or_else(|error| panic!("{program} is needed for this test: {error}"))
}

/// Runs a program that must succeed; gives its standard output.
pub fn must(program: &str, arguments: &[&str]) -> String {
    let output = run(program, arguments);
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// `qemu-img create`: `options` as after `-o`, empty for none.
pub fn create(path: &Path, options: &str, size: u64) {
    let size = size.to_string();
    let mut arguments = vec!["create", "-q", "-f", "qcow2"];
    if !options.is_empty() {
        arguments.extend(["-o", options]);
    }
    arguments.extend([text(path), &size]);
    must("qemu-img", &arguments);
}

/// Runs commands of qemu-io on an image.
pub fn io(path: &Path, commands: &[&str]) {
    let mut arguments = vec!["-f", "qcow2", "-d", "unmap"];
    for command in commands {
        arguments.extend(["-c", command]);
    }
    arguments.push(text(path));
    let output = must("qemu-io", &arguments);
    assert!(!output.contains("failed"), "{commands:?}: {output}");
}

/// A path as text; those of tests always are.
pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A qemu-io that has an image open for writing, until this is dropped.
pub struct Writer(Child);

impl Writer {
    /// Opens it; returns once it is open.
    pub fn of(path: &Path) -> Self {
        let mut child = Command::new("qemu-io")
            .args(["-f", "qcow2", text(path)])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("qemu-io is needed for this test: {error}"));
        // It has the image open once it answers.
        child.stdin.as_mut().unwrap().write_all(b"length\n").unwrap();
        child.stdout.as_mut().unwrap().read_exact(&mut [0; 8]).unwrap();
        Self(child)
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        // It ends by itself now, if it has not failed before.
        let _ = self.0.wait();
    }
}
