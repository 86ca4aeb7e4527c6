//! Deterministic simulation of changes: several instances on one store, run by a seed that lets them crash,
//! stall and meet errors, power cuts and others' hands. What each member shows, and much else, is looked at
//! after every call that changes a name.
//!
//! A failing seed is printed with what happened. `QCHAIN_SEED=n` runs one alone; `QCHAIN_SEEDS=a..b` a range;
//! with `QCHAIN_READS` what happened has the reads, too. With `QCHAIN_FIRST` it ends at the first seed that fails,
//! but for those listed in `QCHAIN_PASS`, which are not run.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use super::support::sim::history::{Threads, history};

/// Histories at once: each runs one thread at a time.
const WORKERS: u64 = 2;
/// Failures that are told.
const TOLD: usize = 5;

fn seeds() -> (u64, u64) {
    let number = |text: &str| text.parse::<u64>().unwrap();
    if let Ok(seed) = std::env::var("QCHAIN_SEED") {
        return (number(&seed), number(&seed) + 1);
    }
    if let Ok(range) = std::env::var("QCHAIN_SEEDS") {
        let (from, to) = range.split_once("..").unwrap();
        return (number(from), number(to));
    }
    (0, if std::env::var_os("QCHAIN_FULL").is_some() { 100_000 } else { 2_000 })
}

#[test]
fn histories_end_well() {
    let (from, to) = seeds();
    let pass = std::env::var("QCHAIN_PASS").unwrap_or_default();
    let pass: Vec<u64> = pass.split_whitespace().map(|seed| seed.parse().unwrap()).collect();
    let first = std::env::var_os("QCHAIN_FIRST").is_some();
    let next = AtomicU64::new(from);
    let failures = Mutex::new(Vec::new());
    let counts = Mutex::new(BTreeMap::<&str, u64>::new());
    std::thread::scope(|scope| {
        for _ in 0..WORKERS {
            scope.spawn(|| {
                let threads = Threads::new();
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= to || first && !failures.lock().unwrap().is_empty() {
                        break;
                    }
                    if pass.contains(&seed) {
                        continue;
                    }
                    let ended = history(&threads, seed, false);
                    let mut counts = counts.lock().unwrap();
                    for (what, count) in ended.counts {
                        *counts.entry(what).or_default() += count;
                    }
                    *counts.entry("calls").or_default() += ended.calls;
                    drop(counts);
                    if let Some(failure) = ended.failure {
                        failures.lock().unwrap().push((seed, failure));
                    }
                }
            });
        }
    });
    let mut failures = failures.into_inner().unwrap();
    failures.sort();
    println!("seeds {from}..{to}: {:?}, {} failed", counts.into_inner().unwrap(), failures.len());
    for (seed, failure) in &failures {
        println!("QCHAIN_SEED={seed}: {failure}");
    }
    if let Some((seed, failure)) = failures.first() {
        let again = history(&Threads::new(), *seed, true);
        println!("{}", again.story);
        let first: Vec<u64> = failures.iter().take(TOLD).map(|(seed, _)| *seed).collect();
        panic!("{} seeds fail, the first {first:?}; {seed}: {failure}", failures.len());
    }
}

/// The same seed gives the same calls.
#[test]
fn a_history_repeats_itself() {
    let threads = Threads::new();
    for seed in 0..60 {
        let (one, two) = (history(&threads, seed, false), history(&Threads::new(), seed, true));
        assert_eq!((one.hash, one.calls, one.failure), (two.hash, two.calls, two.failure), "{seed}");
    }
}
