//! A database on another host: over TLS, by a user with a password, whom the server lets in by no other way.

use std::fs;
use std::process::{Command, Output};

use serde_json::Value;

use super::support::mariadb::MariaDb;
use super::support::nfs::free_port;
use super::support::qemu::{must, text};
use super::support::tls;

const PASSWORD: &str = "s3cret-Pa55";

/// A store with one snapshot and its row, a server, and a certificate that is not the server's.
struct Scene {
    directory: tempfile::TempDir,
    _database: MariaDb,
    port: u16,
}

impl Scene {
    fn make() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        let (certificate, key) = tls::certificate(directory.path(), "own");
        tls::certificate(directory.path(), "other");
        fs::create_dir_all(at("store/snapshots/2/7")).unwrap();
        must("qemu-img", &["create", "-q", "-f", "qcow2", text(&at("store/snapshots/2/7/one")), "1M"]);
        let port = free_port();
        let database = MariaDb::start_tls(port, &certificate, &key);
        database.run(&format!(
            "USE cloud;
             INSERT INTO image_store VALUES (1, 'store-1', 's', 'nfs://h/x', 'Image');
             INSERT INTO snapshots VALUES (1, 'api-1', 'one', 2, 7, 'KVM', 'BackedUp', NULL);
             INSERT INTO snapshot_store_ref (store_id, snapshot_id, created, store_role, size, physical_size, install_path, state)
               VALUES (1, 1, NOW(), 'Image', 1048576, 196616, 'snapshots/2/7/one', 'Ready'),
                      (1, 1, NOW(), 'Image', 1048576, 196616, 'snapshots/2/7/lost', 'Ready');
             CREATE USER reader@localhost IDENTIFIED BY '{PASSWORD}' REQUIRE SSL;
             GRANT SELECT ON cloud.* TO reader@localhost;"
        ));
        Self { directory, _database: database, port }
    }

    fn audit(&self, options: &str) -> Output {
        let store = format!("{},url=nfs://h/x", self.directory.path().join("store").display());
        let url = format!("mysql://reader:{PASSWORD}@127.0.0.1:{}/cloud?{options}", self.port);
        Command::new(env!("CARGO_BIN_EXE_qchain"))
            .args(["--json", "--store", &store, "audit", "--min-age", "0s", "--database", &url])
            .env("XDG_CACHE_HOME", self.directory.path().join("cache"))
            .env_remove("QCHAIN_DATABASE")
            .env_remove("QCHAIN_CONFIG")
            .output()
            .unwrap()
    }
}

#[test]
fn rows_are_read_over_tls_and_only_from_whom_the_certificate_proves() {
    let scene = Scene::make();
    let path = |name: &str| scene.directory.path().join(name).display().to_string();
    let proved = format!("ssl-mode=VERIFY_IDENTITY&ssl-ca={}", path("own.pem"));
    for options in [&proved, "ssl-mode=REQUIRED", ""] {
        let output = scene.audit(options);
        assert_eq!(output.status.code(), Some(0), "{options}: {output:?}");
        let document: Value = serde_json::from_slice(&output.stdout).unwrap();
        let lost = |finding: &Value| finding["member"].as_str().unwrap_or_default().ends_with("/lost");
        assert!(document["findings"].as_array().unwrap().iter().any(lost), "{options}: {document}");
    }
    let other = format!("ssl-mode=VERIFY_IDENTITY&ssl-ca={}", path("other.pem"));
    for options in [&other, "ssl-mode=DISABLED"] {
        let output = scene.audit(options);
        assert_eq!(output.status.code(), Some(8), "{options}: {output:?}");
        let said = format!("{output:?}");
        assert!(said.contains("database"), "{options}: {said}");
        assert!(!said.contains(PASSWORD), "{options}: {said}");
    }
}
