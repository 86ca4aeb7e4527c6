//! Reading single images, held against `qemu-img map`, `convert` and `check`.

use std::path::Path;

use qchain::qcow2::{ExtentKind, Image};
use qchain::units::GuestOffset;
use serde_json::Value;
use tempfile::TempDir;

use crate::support::images::{build, combinations, pattern};
use crate::support::open::open_image;
use crate::support::qemu::{io, must, text};

/// A run as both sides can say it. Compressed clusters are joined: qemu-img does not part them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Data(u64),
    Zero,
    Compressed,
    Below,
}

type Runs = Vec<(u64, u64, Kind)>;

fn push(runs: &mut Runs, start: u64, length: u64, kind: Kind) {
    if let Some((begun, held, last)) = runs.last_mut() {
        assert_eq!(*begun + *held, start, "a gap");
        let continues = match (*last, kind) {
            (Kind::Data(from), Kind::Data(to)) => from + *held == to,
            (a, b) => a == b,
        };
        if continues {
            *held += length;
            return;
        }
    }
    runs.push((start, length, kind));
}

fn our_map(image: &Image) -> Runs {
    let mut runs = Runs::new();
    for extent in image.extents(GuestOffset(0)) {
        let extent = extent.unwrap();
        let kind = match extent.kind {
            ExtentKind::Data { host } => Kind::Data(host.0),
            ExtentKind::Zero => Kind::Zero,
            ExtentKind::Compressed(_) => Kind::Compressed,
            ExtentKind::Below => Kind::Below,
        };
        push(&mut runs, extent.start.0, extent.length, kind);
    }
    runs
}

fn qemu_map(path: &Path) -> Runs {
    let output = must("qemu-img", &["map", "--output=json", "-f", "qcow2", text(path)]);
    let mut runs = Runs::new();
    for entry in serde_json::from_str::<Vec<Value>>(&output).unwrap() {
        let flag = |name: &str| entry.get(name).and_then(Value::as_bool).unwrap();
        // "zero" of data means that the file has a hole there: no matter of the image.
        let kind = match (flag("data"), flag("compressed"), flag("present")) {
            (_, true, _) => Kind::Compressed,
            (true, ..) => Kind::Data(entry["offset"].as_u64().unwrap()),
            (false, _, true) => Kind::Zero,
            (false, _, false) => Kind::Below,
        };
        let length = entry["length"].as_u64().unwrap();
        // An empty disk is one run of no bytes to qemu-img.
        if length > 0 {
            push(&mut runs, entry["start"].as_u64().unwrap(), length, kind);
        }
    }
    runs
}

fn our_bytes(image: &Image) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(image.header().virtual_size).unwrap()];
    for extent in image.extents(GuestOffset(0)) {
        let extent = extent.unwrap();
        let start = usize::try_from(extent.start.0).unwrap();
        let target = &mut bytes[start..][..usize::try_from(extent.length).unwrap()];
        match extent.kind {
            ExtentKind::Data { host } => image.read_data(host, target).unwrap(),
            ExtentKind::Compressed(cluster) => {
                let whole = image.read_compressed(&cluster).unwrap();
                assert_eq!(whole.len() as u64, image.header().cluster_bits.bytes());
                target.copy_from_slice(&whole[..target.len()]);
            }
            ExtentKind::Zero | ExtentKind::Below => {}
        }
    }
    bytes
}

/// Map and bytes must be what qemu-img says.
fn compare(path: &Path) -> Image {
    let image = open_image(path).unwrap();
    assert_eq!(our_map(&image), qemu_map(path), "{}", path.display());
    let raw = path.with_extension("raw");
    must("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", text(path), text(&raw)]);
    assert!(our_bytes(&image) == std::fs::read(&raw).unwrap(), "{}: bytes differ", path.display());
    image
}

#[test]
fn every_format_reads_as_qemu_reads_it() {
    for (index, (options, cluster, version)) in combinations().into_iter().enumerate() {
        let directory = TempDir::new().unwrap();
        let size = 32 * cluster + 512;
        let compress = !options.contains("preallocation");
        let commands = pattern(cluster, version, compress);
        let path = build(&directory, &format!("image{index}"), &options, size, &commands);
        let image = compare(&path);
        assert_eq!(image.header().cluster_bits.bytes(), cluster, "{options}");
        assert_eq!(u64::from(image.header().version), u64::from(version), "{options}");
        let half = image.extents_windowed(GuestOffset(0), 4096).map(Result::unwrap);
        assert!(half.eq(image.extents(GuestOffset(0)).map(Result::unwrap)), "{options}: windows");
    }
}

#[test]
fn converted_compressed_images() {
    for kind in ["zlib", "zstd"] {
        for cluster in [512, 4096, 65_536, 2 << 20] {
            let directory = TempDir::new().unwrap();
            let source = directory.path().join("source");
            // Text-like, with incompressible parts: the program's own binary.
            let mut bytes = std::fs::read(std::env::current_exe().unwrap()).unwrap();
            bytes.truncate(3 << 20);
            std::fs::write(&source, &bytes).unwrap();
            let path = directory.path().join("packed");
            let options = format!("cluster_size={cluster},compression_type={kind}");
            must(
                "qemu-img",
                &["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", &options, text(&source), text(&path)],
            );
            let image = compare(&path);
            assert!(our_bytes(&image)[..bytes.len()] == bytes, "{options}");
        }
    }
}

#[test]
fn sizes_at_the_edges() {
    for (index, (size, options)) in [0, 512, (1 << 20) + 512, 65_536 * 8192]
        .into_iter()
        .flat_map(|size| ["", "cluster_size=512", "cluster_size=2M,extended_l2=on"].map(|o| (size, o)))
        .enumerate()
    {
        let directory = TempDir::new().unwrap();
        let commands =
            if size == 0 { vec![] } else { vec![format!("write -P 0x99 {} 512", (size - 1) / 512 * 512)] };
        compare(&build(&directory, &format!("edge{index}"), options, size, &commands));
    }
}

#[test]
fn snapshots_and_bitmaps_are_read_past() {
    let directory = TempDir::new().unwrap();
    let commands = pattern(65_536, 3, true);
    let path = build(&directory, "image", "", 33 * 65_536, &commands);
    must("qemu-img", &["snapshot", "-c", "first", text(&path)]);
    io(&path, &["write -P 0xaa 0 100k", "write -z 1M 128k"]);
    must("qemu-img", &["snapshot", "-c", "second", text(&path)]);
    must("qemu-img", &["bitmap", "--add", "-g", "64k", text(&path), "one"]);
    must("qemu-img", &["bitmap", "--add", text(&path), "two"]);
    io(&path, &["write -P 0xbb 512k 100k"]);
    let image = compare(&path);
    assert_eq!(image.header().snapshot_count, 2);
    assert_eq!(image.header().bitmaps.map(|bitmaps| bitmaps.count), Some(2));
}

#[test]
fn the_backing_name_is_read() {
    let directory = TempDir::new().unwrap();
    let base = build(&directory, "base", "", 1 << 20, &[]);
    let tip = directory.path().join("tip");
    must("qemu-img", &["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", text(&base), text(&tip)]);
    let image = open_image(&tip).unwrap();
    let backing = image.header().backing.clone().unwrap();
    assert_eq!(backing.name, text(&base).as_bytes());
    assert_eq!(backing.format.as_deref(), Some("qcow2"));
    must("qemu-img", &["rebase", "-u", "-f", "qcow2", "-b", "", text(&tip)]);
    assert!(open_image(&tip).unwrap().header().backing.is_none());
}
