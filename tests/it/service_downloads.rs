//! Downloads: what is at a signed URL is the flattened image, by any client and any range, or nothing.

use std::fs;
use std::io::{Seek, SeekFrom, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use super::support::qemu::{io, must, text};
use super::support::service::{LONG, OPERATE, READ, Served, configure};
use super::support::world::World;

/// a <- b <- {c, d}, opted in, served; adopted if that is wanted.
fn served(adopted: bool) -> (World, Served) {
    let world = World::forked();
    assert_eq!(world.run(&["init"]).0, 0);
    if adopted {
        assert_eq!(world.run(&["adopt", "--now"]).0, 0);
    }
    configure(&world, "");
    let served = Served::start(&world);
    (world, served)
}

/// What the command line makes of a member.
fn truth(world: &World, member: &str, format: &str) -> Vec<u8> {
    let output = Command::new(env!("CARGO_BIN_EXE_qchain"))
        .args(["--store", text(&world.root()), "flatten", member, "-", "-O", format])
        .env("XDG_CACHE_HOME", world.directory.path().join("caches"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    output.stdout
}

fn ask(served: &Served, member: &str, format: &str) -> Value {
    served.post("/v1/downloads", &json!({"member": member, "format": format})).is(200)
}

fn path(document: &Value) -> String {
    document["path"].as_str().unwrap().to_owned()
}

fn url(served: &Served, document: &Value) -> String {
    format!("http://{}{}", served.address, path(document))
}

#[test]
fn the_image_is_that_of_the_command_line_by_any_range() {
    let (world, served) = served(true);
    for format in ["qcow2", "raw"] {
        let truth = truth(&world, "c", format);
        let given = ask(&served, "c", format);
        assert_eq!((&given["length"], &given["virtual_size"]), (&truth.len().into(), &(10 << 20).into()));
        let (path, tag) = (path(&given), given["etag"].as_str().unwrap());
        assert_eq!(given["url"], format!("http://test{path}"));
        let whole = served.send_raw("GET", &path, "", b"");
        assert_eq!((whole.status, whole.body == truth), (200, true), "{format}");
        let head = served.send_raw("HEAD", &path, "", b"");
        assert_eq!((head.status, head.body.len()), (200, 0));
        for answer in [&whole, &head] {
            assert_eq!(answer.header("content-length"), Some(truth.len().to_string().as_str()));
            assert_eq!(answer.header("etag"), Some(tag));
            assert_eq!(answer.header("accept-ranges"), Some("bytes"));
            let name = format!("attachment; filename=\"c.{format}\"");
            assert_eq!(answer.header("content-disposition"), Some(name.as_str()));
        }
        let mut all = Vec::new();
        for start in (0..truth.len()).step_by(999_999) {
            let last = (start + 999_999).min(truth.len()) - 1;
            let part = served.send_raw("GET", &path, &format!("Range: bytes={start}-{last}\r\n"), b"");
            let shown = format!("bytes {start}-{last}/{}", truth.len());
            assert_eq!((part.status, part.header("content-range")), (206, Some(shown.as_str())));
            all.extend(part.body);
        }
        assert!(all == truth, "{format}: the ranges are not the image");
        let last = served.send_raw("GET", &path, "Range: bytes=-5\r\n", b"");
        assert_eq!((last.status, &last.body[..]), (206, &truth[truth.len() - 5..]));
        let behind = format!("Range: bytes={}-\r\n", truth.len());
        let none = served.send_raw("GET", &path, &behind, b"");
        let shown = format!("bytes */{}", truth.len());
        assert_eq!((none.status, none.header("content-range")), (416, Some(shown.as_str())));
        let same = served.send_raw("GET", &path, &format!("If-None-Match: {tag}\r\n"), b"");
        assert_eq!((same.status, same.body.len(), same.header("etag")), (304, 0, Some(tag)));
        let part = served.send_raw("GET", &path, &format!("Range: bytes=7-9\r\nIf-Range: {tag}\r\n"), b"");
        assert_eq!((part.status, &part.body[..]), (206, &truth[7..10]));
    }
    let text = String::from_utf8(served.get("/metrics").body).unwrap();
    assert!(text.contains("qchain_downloaded_bytes_total ") && text.contains("qchain_downloads 0"), "{text}");
}

#[test]
fn members_are_named_by_their_path_too() {
    let (world, served) = served(true);
    let path = "/v1/members/snapshots/2/7/c/download";
    let given = served.post(path, &json!({"format": "raw", "expires_seconds": 60})).is(200);
    assert_eq!(given["member"], "snapshots/2/7/c");
    assert!(
        served.send_raw("GET", given["path"].as_str().unwrap(), "", b"").body == truth(&world, "c", "raw")
    );
    assert_eq!(served.post("/v1/members/snapshots/2/7/c", &json!({})).is(404)["code"], "not-found");
    assert_eq!(served.post("/v1/members/nobody/download", &json!({})).is(404)["code"], "not-found");
    assert_eq!(served.get("/v1/members/snapshots/2/7/c").is(200)["member"], "snapshots/2/7/c");
    for seconds in [json!(0), json!(604_801), json!(-1)] {
        let request = json!({"member": "c", "expires_seconds": seconds});
        assert_eq!(served.post("/v1/downloads", &request).is(400)["code"], "usage");
    }
}

#[test]
fn only_the_url_that_was_given_is_served_and_only_for_its_time() {
    let (world, served) = served(true);
    let request = json!({"member": "c", "format": "raw"});
    assert_eq!(served.send("POST", "/v1/downloads", READ, Some(&request)).status, 403);
    assert_eq!(served.send_raw("POST", "/v1/downloads", "", b"").status, 401);
    let good = path(&ask(&served, "c", "raw"));
    let signature = good.rsplit('=').next().unwrap();
    let flipped = if signature.ends_with('0') { "1" } else { "0" };
    for bad in [
        good.replace("2/7/c", "2/7/d"),
        good.replace("c.raw", "d.raw"),
        good.replace("format=raw", "format=qcow2"),
        good.replace("expires=", "expires=9"),
        good.replace(signature, ""),
        good.replace(signature, &"0".repeat(64)),
        format!("{}{flipped}", &good[..good.len() - 1]),
    ] {
        assert_ne!(bad, good);
        // A token is no signature.
        for head in [String::new(), format!("Authorization: Bearer {OPERATE}\r\n")] {
            assert_eq!(served.send_raw("GET", &bad, &head, b"").is(403)["code"], "forbidden", "{bad}");
        }
    }
    for bad in ["/v1/downloads/c.raw", &good.replace("format=raw", "format=x")] {
        assert_eq!(served.send_raw("GET", bad, "", b"").status, 400, "{bad}");
    }
    let request = json!({"member": "c", "expires_seconds": 1});
    let short = path(&served.post("/v1/downloads", &request).is(200));
    let begun = std::time::Instant::now();
    while served.send_raw("HEAD", &short, "", b"").status == 200 {
        assert!(begun.elapsed() < LONG, "it does not end");
    }
    assert!(served.send_raw("GET", &short, "", b"").is(403)["detail"].as_str().unwrap().contains("expired"));
    let log = || fs::read_to_string(world.directory.path().join("log")).unwrap();
    assert!(!log().contains(signature), "a signature is in the log");
    // Another instance, and this one started anew, take it.
    let other = Served::start(&world);
    served.kill();
    let answer = other.send_raw("GET", &good, "", b"");
    assert_eq!((answer.status, answer.body == truth(&world, "c", "raw")), (200, true));
}

#[test]
fn clients_continue_and_share_out_a_download() {
    let (world, served) = served(true);
    for format in ["qcow2", "raw"] {
        let truth = truth(&world, "c", format);
        let url = url(&served, &ask(&served, "c", format));
        let file = world.directory.path().join(format!("curl.{format}"));
        fs::write(&file, &truth[..truth.len() / 3]).unwrap();
        must("curl", &["--fail", "--silent", "--show-error", "-C", "-", "-o", text(&file), &url]);
        assert!(fs::read(&file).unwrap() == truth, "curl, {format}");
        let directory = world.directory.path();
        let options = ["-x8", "-s8", "-k1M", "--quiet", "--no-conf", "--file-allocation=none"];
        let name = format!("aria.{format}");
        must("aria2c", &[&options[..], &["-d", text(directory), "-o", &name, &url]].concat());
        assert!(fs::read(directory.join(name)).unwrap() == truth, "aria2c, {format}");
        must("curl", &["--fail", "--silent", "--output-dir", text(directory), "-OJ", &url]);
        assert!(fs::read(directory.join(format!("c.{format}"))).unwrap() == truth, "its own name, {format}");
    }
}

#[test]
fn parts_of_two_versions_are_never_put_together() {
    let (world, served) = served(true);
    let given = ask(&served, "c", "raw");
    let (path, tag) = (path(&given), given["etag"].as_str().unwrap());
    let head = format!("Range: bytes=0-9\r\nIf-Range: {tag}\r\n");
    assert_eq!(served.send_raw("GET", &path, &head, b"").status, 206);
    // The same view in other files is the same image.
    served.do_job(&json!({"kind": "delete", "members": ["d"], "assume_deleted": true, "end_of_chain": true,
        "now": true, "grace_seconds": 0}));
    served.do_job(&json!({"kind": "delete", "members": ["b"], "assume_deleted": true, "now": true,
        "grace_seconds": 0}));
    let merged = served.send_raw("GET", &path, &head, b"");
    assert_eq!((merged.status, merged.header("etag")), (206, Some(tag)));
    io(&world.member("c"), &["write -P 9 0 64k"]);
    let changed = served.send_raw("GET", &path, &head, b"");
    assert_eq!((changed.status, changed.header("etag")), (200, None), "it is not adopted any more");
    assert!(changed.body == truth(&world, "c", "raw"));
    assert_eq!(changed.body[0], 9);
    assert_eq!(ask(&served, "c", "raw")["etag"], Value::Null);
}

#[test]
fn what_is_not_adopted_is_served_without_a_tag() {
    let (world, served) = served(false);
    for format in ["qcow2", "raw"] {
        let given = ask(&served, "c", format);
        assert_eq!(given["etag"], Value::Null);
        let (path, truth) = (path(&given), truth(&world, "c", format));
        let answer = served.send_raw("GET", &path, "Range: bytes=0-9\r\nIf-Range: \"x\"\r\n", b"");
        assert_eq!((answer.status, answer.header("etag"), answer.body == truth), (200, None, true));
        let part = served.send_raw("GET", &path, "Range: bytes=1000-1999\r\n", b"");
        assert_eq!((part.status, &part.body[..]), (206, &truth[1000..2000]));
    }
}

#[test]
fn a_damaged_block_cuts_the_connection_before_a_wrong_byte() {
    let world = World::new();
    world.make("a", "", &["write -P 1 0 8704k"]);
    world.make("b", "a", &["write -P 2 9M 128k"]);
    assert_eq!(world.run(&["init"]).0, 0);
    assert_eq!(world.run(&["adopt", "--now"]).0, 0);
    configure(&world, "");
    let served = Served::start(&world);
    let truth = truth(&world, "b", "raw");
    let path = path(&ask(&served, "b", "raw"));
    let bytes = fs::read(world.member("b")).unwrap();
    let at = bytes.chunks(4096).position(|chunk| chunk == [2; 4096]).unwrap() as u64 * 4096;
    let file = fs::OpenOptions::new().write(true).open(world.member("b")).unwrap();
    file.write_all_at(&[3], at + 4096).unwrap();
    let answer = served.send_raw("GET", &path, "", b"");
    let length: usize = answer.header("content-length").unwrap().parse().unwrap();
    assert_eq!((answer.status, length), (200, truth.len()));
    assert!(answer.body.len() <= 9 << 20, "{} bytes came", answer.body.len());
    assert!(truth.starts_with(&answer.body), "a wrong byte came");
    // What fails at once is told.
    let there = served.send_raw("GET", &path, &format!("Range: bytes={}-\r\n", 9 << 20), b"");
    assert_eq!(there.is(422)["code"], "data-damaged");
    let good = served.send_raw("GET", &path, &format!("Range: bytes=5-{}\r\n", (9 << 20) - 1), b"");
    assert!(good.status == 206 && good.body == truth[5..9 << 20], "what is not damaged is served");
    let text = String::from_utf8(served.get("/metrics").body).unwrap();
    assert!(text.contains("qchain_errors_total{code=\"data-damaged\"} "), "{text}");
}

#[test]
fn who_goes_away_ends_the_reading() {
    let (world, served) = served(true);
    let path = path(&ask(&served, "c", "raw"));
    for _ in 0..20 {
        let mut stream = served.connect();
        stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: test\r\n\r\n").as_bytes()).unwrap();
    }
    let begun = std::time::Instant::now();
    loop {
        let text = String::from_utf8(served.get("/metrics").body).unwrap();
        if text.contains("qchain_downloads 0\n") {
            break;
        }
        assert!(begun.elapsed() < LONG, "{text}");
    }
    assert!(served.send_raw("GET", &path, "", b"").body == truth(&world, "c", "raw"));
}

/// A snapshot is read, and written over, without being restored: QEMU has the URL as the backing file of an overlay.
#[test]
fn qemu_takes_the_raw_url_for_a_backing_file() {
    let (world, served) = served(true);
    let url = url(&served, &ask(&served, "c", "raw"));
    let place = |name: &str| world.directory.path().join(name);
    let (overlay, flat) = (place("overlay"), place("flat"));
    must("qemu-img", &["create", "-q", "-f", "qcow2", "-F", "raw", "-b", &url, text(&overlay)]);
    fs::write(&flat, truth(&world, "c", "raw")).unwrap();
    must("qemu-img", &["compare", "-q", "-f", "qcow2", "-F", "raw", text(&overlay), text(&flat)]);
    io(&overlay, &["read -P 3 5M 128k", "read -P 2 1M 128k", "write -P 7 5M 64k", "read -P 7 5M 64k"]);
    let mut file = fs::OpenOptions::new().write(true).open(&flat).unwrap();
    file.seek(SeekFrom::Start(5 << 20)).unwrap();
    file.write_all(&vec![7; 64 << 10]).unwrap();
    must("qemu-img", &["compare", "-q", "-f", "qcow2", "-F", "raw", text(&overlay), text(Path::new(&flat))]);
}
