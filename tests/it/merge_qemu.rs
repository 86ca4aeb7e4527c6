//! Results of merges, as QEMU sees them.

use std::fs;

use proptest::prelude::*;
use tempfile::TempDir;

use crate::support::merging::{Chain, bytes_of, layer_name, seeded, sizes, spec};
use crate::support::qemu::{must, text};

/// Merges at random places of random chains: `qemu-img check` is clean, and `compare` finds the model's bytes.
#[test]
fn qemu_reads_what_the_model_says() {
    let chains = (
        prop::collection::vec(spec(sizes(300 * 1024)), 1..=5),
        any::<prop::sample::Index>(),
        any::<prop::sample::Index>(),
    );
    seeded(40)
        .run(&chains, |(specs, at, count)| {
            let bottom = at.index(specs.len());
            let top = bottom + count.index(specs.len() - bottom);
            let directory = TempDir::new().unwrap();
            let chain = Chain::in_memory(true, specs);
            for (index, image) in chain.images.iter().enumerate() {
                fs::write(directory.path().join(layer_name(index)), bytes_of(&**image.file())).unwrap();
            }
            let merged = chain.merge(bottom, top, "result").unwrap();
            let result = directory.path().join("result");
            fs::write(&result, bytes_of(&*merged.file)).unwrap();
            let model = directory.path().join("model");
            fs::write(&model, &chain.views[top]).unwrap();
            // The sources too: a builder that QEMU does not understand would prove nothing.
            for image in [&result, &directory.path().join(layer_name(top))] {
                must("qemu-img", &["check", "-q", "-f", "qcow2", text(image)]);
                must("qemu-img", &["compare", "-q", "-f", "qcow2", "-F", "raw", text(image), text(&model)]);
            }
            let info = must("qemu-img", &["info", "--output=json", "-f", "qcow2", text(&result)]);
            let info: serde_json::Value = serde_json::from_str(&info).unwrap();
            assert_eq!(info["virtual-size"], chain.specs[top].size);
            Ok(())
        })
        .unwrap();
}
