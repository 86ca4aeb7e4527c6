//! A database server with CloudStack's tables, as far as snapshots are concerned: MariaDB, or one that runs already.
//!
//! `QCHAIN_MYSQL_SOCKET=PATH` names the socket of another server (MySQL) whose user root needs no password; its database `cloud` is
//! dropped and made anew, so tests have to run one after the other (`--test-threads=1`).

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::qemu::{must, text};

/// How long the server may take to start.
const PATIENCE: Duration = Duration::from_mins(1);

/// The columns that CloudStack has and that matter here, of the types it gives them.
const TABLES: &str = "
CREATE DATABASE cloud;
USE cloud;
CREATE TABLE image_store (
  id BIGINT UNSIGNED PRIMARY KEY AUTO_INCREMENT, uuid VARCHAR(255) UNIQUE, name VARCHAR(255),
  url VARCHAR(255), role VARCHAR(255) DEFAULT 'Image');
CREATE TABLE snapshots (
  id BIGINT UNSIGNED PRIMARY KEY AUTO_INCREMENT, uuid VARCHAR(40) UNIQUE, name VARCHAR(255),
  account_id BIGINT UNSIGNED, volume_id BIGINT UNSIGNED, hypervisor_type VARCHAR(32), status VARCHAR(32),
  removed DATETIME);
CREATE TABLE snapshot_store_ref (
  id BIGINT UNSIGNED PRIMARY KEY AUTO_INCREMENT, store_id BIGINT UNSIGNED, snapshot_id BIGINT UNSIGNED,
  created DATETIME, store_role VARCHAR(255), size BIGINT UNSIGNED, physical_size BIGINT UNSIGNED DEFAULT 0,
  parent_snapshot_id BIGINT UNSIGNED DEFAULT 0, install_path VARCHAR(255), state VARCHAR(255),
  ref_cnt BIGINT UNSIGNED DEFAULT 0, kvm_checkpoint_path VARCHAR(255), end_of_chain INT(1) UNSIGNED,
  display TINYINT(1) DEFAULT 1, download_url VARCHAR(2048),
  KEY i_snapshot_id (snapshot_id), KEY i_store_id (store_id)) ENGINE=InnoDB;
";

/// A server of our own, on a socket in a directory of its own; it ends with this value.
#[derive(Debug)]
pub struct MariaDb {
    socket: PathBuf,
    /// None: it was there before.
    own: Option<(Child, TempDir)>,
}

impl MariaDb {
    /// Starts one with empty tables.
    pub fn start() -> Self {
        if let Some(socket) = std::env::var_os("QCHAIN_MYSQL_SOCKET") {
            let database = Self { socket: socket.into(), own: None };
            database.reset();
            return database;
        }
        Self::start_with(&["--skip-networking"])
    }

    /// Starts one with empty tables that also listens on a port of 127.0.0.1, with a certificate and its key.
    pub fn start_tls(port: u16, certificate: &Path, key: &Path) -> Self {
        let (certificate, key) =
            (format!("--ssl-cert={}", certificate.display()), format!("--ssl-key={}", key.display()));
        Self::start_with(&["--bind-address=127.0.0.1", &format!("--port={port}"), &certificate, &key])
    }

    fn start_with(flags: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let data = directory.path().join("data");
        let data_flag = format!("--datadir={}", data.display());
        must(
            "mariadb-install-db",
            &["--no-defaults", &data_flag, "--auth-root-authentication-method=normal", "--user=root"],
        );
        let server = Command::new("mariadbd")
            .args(["--no-defaults", "--user=root", "--innodb-buffer-pool-size=32M"])
            .args(flags)
            .arg(&data_flag)
            .arg(format!("--socket={}", directory.path().join("s").display()))
            .arg(format!("--pid-file={}", directory.path().join("pid").display()))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap_or_else(|error| panic!("mariadbd: {error}"));
        let database = Self { socket: directory.path().join("s"), own: Some((server, directory)) };
        let begun = Instant::now();
        while !database.client("SELECT 1").status().unwrap().success() {
            assert!(begun.elapsed() < PATIENCE, "the database server does not start");
            std::thread::sleep(Duration::from_millis(100));
        }
        database.reset();
        database
    }

    /// Empty tables.
    pub fn reset(&self) {
        self.run(&format!("DROP DATABASE IF EXISTS cloud; {TABLES}"));
    }

    fn client(&self, sql: &str) -> Command {
        let mut client = Command::new("mariadb");
        client.args(["--no-defaults", "--batch", "--user=root", "--socket", text(&self.socket), "-e", sql]);
        client.stderr(Stdio::null()).stdout(Stdio::null());
        client
    }

    /// What it is connected to by.
    pub fn url(&self) -> String {
        format!("mysql://root@localhost/cloud?socket={}", self.socket.display())
    }

    /// Runs statements.
    pub fn run(&self, sql: &str) {
        let output = self.client(sql).stderr(Stdio::piped()).output().unwrap();
        assert!(output.status.success(), "{sql}: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// What a query gives: lines of fields with tabs, without the header.
    pub fn ask(&self, sql: &str) -> Vec<String> {
        let output = self.client(&format!("USE cloud; {sql}")).stdout(Stdio::piped()).output().unwrap();
        assert!(output.status.success(), "{sql}");
        String::from_utf8(output.stdout).unwrap().lines().skip(1).map(str::to_owned).collect()
    }

    /// The export that an operator makes.
    pub fn export(&self, to: &Path) {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/export-records.sql");
        let output = Command::new("mariadb")
            .args(["--no-defaults", "--batch", "--user=root", "--socket", text(&self.socket), "cloud"])
            .stdin(std::fs::File::open(script).unwrap())
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        std::fs::write(to, output.stdout).unwrap();
    }
}

impl Drop for MariaDb {
    fn drop(&mut self) {
        if let Some((server, _)) = &mut self.own {
            // Nothing of it is needed any more.
            let _ = server.kill();
            let _ = server.wait();
        }
    }
}
