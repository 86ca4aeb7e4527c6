//! Real images with flipped bytes in their metadata: where qchain and QEMU both read one, they read the same.

use std::fs;
use std::path::Path;

use qchain::failure::Failure as _;
use qchain::store::chain::OpenChain;
use qchain::units::GuestOffset;

use super::support::chains::Numbers;
use super::support::crash::full;
use super::support::hostile::Corpus;
use super::support::images::{build, pattern};
use super::support::open::open_image;
use super::support::qemu::{run, text};

/// The largest disk that is read whole.
const MAX_VIEW_BYTES: u64 = 64 << 20;

/// What became of an image.
#[derive(Debug, PartialEq, Eq)]
enum Read {
    Ours,
    Theirs,
    Both,
    Neither,
    /// Not worth reading: a disk of no real size.
    Huge,
}

/// The view as qchain reads it; `None` if it refuses.
fn ours(path: &Path) -> Option<Vec<u8>> {
    let image = open_image(path).ok()?;
    if image.header().backing.is_some() {
        return None;
    }
    let mut view = vec![0; usize::try_from(image.header().virtual_size).unwrap()];
    let read = OpenChain::of(vec![image]).read(GuestOffset(0), &mut view);
    read.map_err(|error| error.code()).ok().map(|()| view)
}

/// Fails unless both read the same, if both read.
fn compare(path: &Path, raw: &Path) -> Read {
    if open_image(path).is_ok_and(|image| image.header().virtual_size > MAX_VIEW_BYTES) {
        return Read::Huge;
    }
    let _ = fs::remove_file(raw);
    // A name that the image chose is QEMU's to open: none here has one that leads anywhere.
    let convert =
        run("timeout", &["10", "qemu-img", "convert", "-f", "qcow2", "-O", "raw", text(path), text(raw)]);
    let theirs = convert.status.success().then(|| fs::read(raw).unwrap());
    match (ours(path), theirs) {
        (Some(ours), Some(theirs)) => {
            let differs = ours.iter().zip(&theirs).position(|(ours, theirs)| ours != theirs);
            assert!(differs.is_none(), "{}: they differ from {differs:?} on", path.display());
            // Of a disk that ends within a sector QEMU converts the whole sectors.
            assert_eq!(ours.len() / 512, theirs.len() / 512, "{}", path.display());
            Read::Both
        }
        (Some(_), None) => Read::Ours,
        (None, Some(_)) => Read::Theirs,
        (None, None) => Read::Neither,
    }
}

#[test]
fn mutated_images_that_both_accept_read_the_same() {
    let directory = tempfile::tempdir_in("/dev/shm").unwrap();
    let mut numbers = Numbers(23);
    let mut counted = [0; 4];
    for (index, (options, bits, compress)) in [
        ("cluster_size=512", 9, true),
        ("cluster_size=4096,compression_type=zstd", 12, true),
        ("cluster_size=65536,compat=0.10", 16, true),
        ("cluster_size=16384,extended_l2=on", 14, true),
        ("cluster_size=65536,preallocation=metadata", 16, false),
    ]
    .into_iter()
    .enumerate()
    {
        let cluster = 1_u64 << bits;
        let version = if options.contains("0.10") { 2 } else { 3 };
        let good = build(
            &directory,
            &format!("good{index}"),
            options,
            40 * cluster,
            &pattern(cluster, version, compress),
        );
        let bytes = fs::read(&good).unwrap();
        let places = metadata(&bytes, cluster);
        for round in 0..if full() { 4000 } else { 60 } {
            let mut mutant = bytes.clone();
            for _ in 0..=numbers.below(3) {
                let (at, length) = places[usize::try_from(numbers.below(places.len() as u64)).unwrap()];
                // Most of a table is zeros: rather its beginning, where entries are.
                let within = if numbers.below(2) == 0 { length.min(320) } else { length };
                let at = usize::try_from(at + numbers.below(within)).unwrap();
                mutant[at] ^= u8::try_from(1 << numbers.below(8)).unwrap();
            }
            let path = directory.path().join(format!("mutant{index}-{round}"));
            fs::write(&path, mutant).unwrap();
            match compare(&path, &directory.path().join("raw")) {
                Read::Both => counted[0] += 1,
                Read::Ours => counted[1] += 1,
                Read::Theirs => counted[2] += 1,
                Read::Neither | Read::Huge => counted[3] += 1,
            }
            fs::remove_file(&path).unwrap();
        }
    }
    let [both, only_ours, only_theirs, neither] = counted;
    eprintln!("both read {both}, qchain alone {only_ours}, QEMU alone {only_theirs}, neither {neither}");
    assert!(both >= 60, "{counted:?}");
}

/// Where the header, the L1 table and the L2 tables lie.
fn metadata(bytes: &[u8], cluster: u64) -> Vec<(u64, u64)> {
    let word = |at: u64| {
        let at = usize::try_from(at).unwrap();
        u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
    };
    let (entries, l1) = (word(36) >> 32, word(40));
    let tables =
        (0..entries).map(|index| word(l1 + index * 8) & 0x00ff_ffff_ffff_fe00).filter(|table| *table > 0);
    let mut places = vec![(0, 112), (l1, entries * 8)];
    places.extend(tables.map(|table| (table, cluster)));
    places
}

#[test]
fn hostile_images_that_both_accept_read_the_same() {
    let corpus = Corpus::make();
    let raw = corpus.cache().with_file_name("raw");
    let mut both = 0;
    let alone = |image: &&super::support::hostile::Image| {
        !["name", "cycle", "above", "deep", "data-file", "symlink", "fifo", "unix"]
            .iter()
            .any(|part| image.family.starts_with(part))
    };
    for image in corpus.images.iter().filter(alone) {
        let path = corpus.root().join(&image.file);
        both += usize::from(compare(&path, &raw) == Read::Both);
    }
    eprintln!("both read {both} of the corpus");
    assert!(both >= 40, "{both}");
}
