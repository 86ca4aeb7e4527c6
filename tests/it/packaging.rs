//! What the package brings along: alerts and dashboard ask for figures that the service has; the example is understood.

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;

use serde_json::{Value, json};

use super::support::service::{Served, configure, write_rows};
use super::support::world::World;

fn file(name: &str) -> String {
    fs::read_to_string(format!("{}/packaging/{name}", env!("CARGO_MANIFEST_DIR"))).unwrap()
}

/// All words of a text that are names of figures.
fn figures(text: &str) -> BTreeSet<&str> {
    let words = text.split(|letter: char| !(letter.is_ascii_alphanumeric() || letter == '_'));
    words.filter(|word| word.starts_with("qchain_")).collect()
}

#[test]
fn alerts_and_dashboard_ask_for_figures_that_there_are() {
    let world = World::forked();
    assert_eq!(world.run(&["init"]).0, 0);
    assert_eq!(world.run(&["adopt", "c", "--now"]).0, 0);
    assert_eq!(world.run(&["verify", "c", "--level", "data"]).0, 0);
    let leave = ["delete", "b", "--assume-deleted", "--now", "--yes", "--grace", "1h"];
    assert_eq!(world.run(&leave).0, 0);
    let rows = write_rows(&world, &[("a", "Ready"), ("b", "Hidden"), ("c", "Ready"), ("d", "Ready")]);
    configure(&world, &format!("[schedule]\nrecords = {rows:?}\n"));
    let served = Served::start(&world);
    served.do_job(&json!({"kind": "verify"}));
    assert_eq!(served.get("/nothing").status, 404);
    // The first answer is counted in the second.
    served.get("/metrics");
    let text = String::from_utf8(served.get("/metrics").body).unwrap();
    let there = figures(&text);
    let dashboard = file("grafana-dashboard.json");
    let parsed: Value = serde_json::from_str(&dashboard).unwrap();
    assert!(parsed["panels"].as_array().unwrap().len() > 6);
    for asked in [dashboard, file("prometheus-alerts.yml")] {
        let asked = figures(&asked);
        assert!(asked.len() > 5, "{asked:?}");
        let missing: Vec<_> = asked.difference(&there).collect();
        assert!(missing.is_empty(), "{missing:?} in\n{text}");
    }
    // What a look at the members says.
    let value = |line: &str| -> u64 {
        let found = text.lines().find_map(|one| one.strip_prefix(line)?.trim().parse().ok());
        found.unwrap_or_else(|| panic!("no {line}\n{text}"))
    };
    let (_, list) = world.run(&["list"]);
    let leaving = |entry: &&Value| entry["state"] == "leaving";
    let entry = list["chains"][0]["members"].as_array().unwrap().iter().find(leaving).unwrap();
    assert_eq!(Some(value("qchain_leaving_bytes{store=\"s1\"}")), entry["allocated_bytes"].as_u64());
    assert_eq!(value("qchain_pinned_bytes{store=\"s1\"}"), value("qchain_leaving_bytes{store=\"s1\"}"));
    let (_, owed) = world.run(&["verify", "--debt"]);
    let adopted = owed["debt"].as_array().unwrap().iter().filter(|one| one["adopted"] == true).count();
    let known = |word: &str| {
        let labels = |line: &&str| {
            line.starts_with("qchain_members{")
                && line.contains("store=\"s1\"")
                && line.contains(&format!("known=\"{word}\""))
        };
        let line = text.lines().find(labels).unwrap_or_else(|| panic!("no {word}\n{text}"));
        line.rsplit(' ').next().unwrap().parse::<usize>().unwrap()
    };
    assert!(adopted > 0);
    assert_eq!(known("read") + known("never-read"), adopted);
    assert_eq!(known("not-adopted"), owed["debt"].as_array().unwrap().len() - adopted);
    assert!(value("qchain_verification_age_seconds{store=\"s1\"}") < 600);
}

/// What scripts/package makes itself is tried by scripts/try-package.
#[test]
fn what_goes_into_the_package_is_there() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let text = fs::read_to_string(root.join("Cargo.toml")).unwrap();
    let parsed: toml::Table = toml::from_str(&text).unwrap();
    let package = &parsed["package"]["metadata"]["deb"];
    let assets: Vec<Vec<&str>> = package["assets"]
        .as_array()
        .unwrap()
        .iter()
        .map(|asset| asset.as_array().unwrap().iter().map(|part| part.as_str().unwrap()).collect())
        .collect();
    for asset in &assets {
        let [from, to, mode] = asset[..] else { panic!("{asset:?}") };
        assert!(from.starts_with("target/release/deb/") || root.join(from).is_file(), "{from} is not there");
        assert_eq!(mode, if to.starts_with("usr/bin") { "755" } else { "644" }, "{to}");
        // What is below /etc would be asked about at each upgrade.
        assert!(to.starts_with("usr/"), "{to}");
    }
    // All that is kept for the package is in it.
    let scripts = package["maintainer-scripts"].as_str().unwrap();
    for entry in fs::read_dir(root.join("packaging")).unwrap() {
        let name = format!("packaging/{}", entry.unwrap().file_name().into_string().unwrap());
        assert!(name == scripts || assets.iter().any(|asset| asset[0] == name), "{name} is left out");
    }
}

#[test]
fn the_unit_waits_longer_than_the_service_takes_to_end() {
    let unit = file("qchain.service");
    let value = |key: &str| unit.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('=')).unwrap();
    assert!(value("TimeoutStopSec").parse::<u32>().unwrap() > 30);
    assert_eq!((value("ProtectSystem"), value("NoNewPrivileges")), ("strict", "yes"));
    assert!(value("ExecReload").contains("-HUP"));
    assert_eq!(value("ExecStart"), "/usr/bin/qchain serve");
}

#[test]
fn manual_pages_and_completions_are_printed_for_the_package() {
    let qchain = |arguments: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_qchain")).arg("docs").args(arguments).output().unwrap();
        (output.status.code(), String::from_utf8(output.stdout).unwrap())
    };
    let (exit, commands) = qchain(&["commands"]);
    assert_eq!(exit, Some(0));
    assert!(commands.lines().any(|name| name == "serve") && !commands.contains("docs"), "{commands}");
    for name in commands.lines() {
        let (exit, page) = qchain(&["man", name]);
        assert!(exit == Some(0) && page.contains(".TH") && page.contains(name), "{page}");
    }
    for shell in ["bash", "zsh", "fish"] {
        let (exit, text) = qchain(&["completion", shell]);
        assert!(exit == Some(0) && text.contains("reclaim"), "{shell}: {text}");
    }
    assert_eq!((qchain(&["completion", "tcsh"]).0, qchain(&["man", "nothing"]).0), (Some(2), Some(2)));
}
