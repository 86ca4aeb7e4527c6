//! QEMU's own programs as oracles. A missing program fails the test.

use std::path::Path;
use std::process::{Command, Output};

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
