//! Images of every format that QEMU makes.

use std::path::PathBuf;

use tempfile::TempDir;

use super::qemu::{create, io};

/// Commands for qemu-io that give every kind of cluster in a disk of at least 32 clusters.
pub fn pattern(cluster: u64, version: u32, compress: bool) -> Vec<String> {
    let mut commands = vec![
        format!("write -P 0x11 0 {}", 3 * cluster),
        format!("write -P 0x22 {} {cluster}", 5 * cluster),
        format!("write -P 0x33 {} 512", 7 * cluster + cluster / 2),
        format!("write -P 0x44 {} {}", 20 * cluster, 6 * cluster),
        format!("discard {} {cluster}", 22 * cluster),
        format!("write -P 0x55 {} 512", 31 * cluster),
    ];
    if version == 3 {
        commands.push(format!("write -z {} {}", 9 * cluster, 2 * cluster));
        commands.push(format!("write -z {cluster} {cluster}"));
        commands.push(format!("write -z -u {} {cluster}", 2 * cluster));
        commands.push(format!("write -z {} 512", 5 * cluster));
    }
    if compress {
        for index in 13..17 {
            commands.push(format!("write -c -P {} {} {cluster}", index * 7, index * cluster));
        }
        commands.push(format!("write -c -P 0x66 {} {cluster}", 18 * cluster));
        commands.push(format!("write -P 0x77 {} 512", 14 * cluster));
    }
    commands
}

/// Makes an image in `directory` and runs commands of qemu-io on it.
pub fn build(directory: &TempDir, name: &str, options: &str, size: u64, commands: &[String]) -> PathBuf {
    let path = directory.path().join(name);
    create(&path, options, size);
    if !commands.is_empty() {
        io(&path, &commands.iter().map(String::as_str).collect::<Vec<_>>());
    }
    path
}

/// The options of every combination that QEMU accepts, with cluster size and version.
pub fn combinations() -> Vec<(String, u64, u32)> {
    let mut all = Vec::new();
    for (cluster, compat) in [512, 4096, 65_536, 2 << 20].into_iter().flat_map(|c| [(c, 2), (c, 3)]) {
        let base = format!("cluster_size={cluster},compat={}", if compat == 2 { "0.10" } else { "1.1" });
        all.push((base.clone(), cluster, compat));
        if compat == 3 {
            for bits in [1, 2, 64] {
                all.push((format!("{base},refcount_bits={bits}"), cluster, 3));
            }
            all.push((format!("{base},compression_type=zstd"), cluster, 3));
            all.push((format!("{base},lazy_refcounts=on"), cluster, 3));
        }
        all.push((format!("{base},preallocation=metadata"), cluster, compat));
    }
    for cluster in [16_384, 65_536, 2 << 20] {
        let base = format!("cluster_size={cluster},extended_l2=on");
        all.push((base.clone(), cluster, 3));
        all.push((format!("{base},compression_type=zstd"), cluster, 3));
        all.push((format!("{base},preallocation=metadata"), cluster, 3));
    }
    all
}
