//! A set of host units (cluster-sized pieces of a source file) with rank and select.
//!
//! Placing data in *source order* is what makes a merge cheap: neighbours in the source stay neighbours in
//! the target, however scattered they are in the guest, so one clone or one large read moves many clusters.
//! The set holds one bit a unit in chunks of 4,096, so memory follows the data (about 0.6 KiB per 4,096
//! units: 2.4 MiB per TiB of 64 KiB clusters), not the declared length of a file. Within a chunk each group of
//! 8 words knows how many units lie before it, so that neither rank nor select counts more than 8 words.

use std::collections::BTreeMap;

const WORDS: usize = 64;
const CHUNK_UNITS: u64 = 64 * WORDS as u64;

/// Words of which a chunk knows the units before them.
const GROUP: usize = 8;

type Words = [u64; WORDS];

/// The set while it grows.
#[derive(Debug, Default)]
pub struct Collecting {
    chunks: BTreeMap<u64, Box<Words>>,
}

/// The finished set.
#[derive(Clone, Debug, Default)]
pub struct HostSet {
    chunks: Vec<Chunk>,
    len: u64,
}

#[derive(Clone, Debug)]
struct Chunk {
    index: u64,
    /// How many units of the set lie in chunks before this one.
    before: u64,
    /// The same within the chunk, before each group of its words.
    groups: [u16; WORDS / GROUP],
    words: Box<Words>,
}

impl Chunk {
    fn new(index: u64, before: u64, words: Box<Words>) -> (Self, u64) {
        let mut groups = [0; WORDS / GROUP];
        let mut count = 0;
        for (group, words) in groups.iter_mut().zip(words.chunks(GROUP)) {
            *group = count;
            count += words.iter().map(|word| ones_in(*word)).sum::<u16>();
        }
        (Self { index, before, groups, words }, before + u64::from(count))
    }
}

impl Collecting {
    /// Adds `count` units from `first`; `false` (and no promise about the set) if one was there already.
    #[must_use]
    pub fn insert(&mut self, first: u64, count: u64) -> bool {
        let end = first.saturating_add(count);
        let mut unit = first;
        while unit < end {
            let chunk = unit / CHUNK_UNITS;
            let words = self.chunks.entry(chunk).or_insert_with(|| Box::new([0; WORDS]));
            let stop = end.min((chunk + 1).saturating_mul(CHUNK_UNITS));
            while unit < stop {
                let Some(word) = usize::try_from(unit % CHUNK_UNITS / 64).ok().and_then(|w| words.get_mut(w))
                else {
                    return false;
                };
                let low = unit % 64;
                let bits = (64 - low).min(stop - unit);
                let mask = ones(bits) << low;
                if *word & mask != 0 {
                    return false;
                }
                *word |= mask;
                unit += bits;
            }
        }
        true
    }

    /// Ends collecting.
    #[must_use]
    pub fn finish(self) -> HostSet {
        let mut len = 0;
        let counted = |(index, words)| {
            let (chunk, after) = Chunk::new(index, len, words);
            len = after;
            chunk
        };
        let chunks = self.chunks.into_iter().map(counted).collect();
        HostSet { chunks, len }
    }
}

/// How many units a word has: at most 64.
#[expect(clippy::cast_possible_truncation, reason = "a word has 64 bits")]
fn ones_in(word: u64) -> u16 {
    word.count_ones() as u16
}

/// Where in a word the unit with that rank is; the word has as many.
fn select_in(word: u64, rank: u16) -> u64 {
    let (mut left, mut at) = (rank, 0);
    for width in [32, 16, 8, 4, 2, 1] {
        let count = ones_in(word >> at & ones(width));
        if left >= count {
            left -= count;
            at += width;
        }
    }
    at
}

fn ones(count: u64) -> u64 {
    if count >= 64 { u64::MAX } else { (1 << count) - 1 }
}

impl HostSet {
    /// How many units it has.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// The memory that it takes, in bytes, about.
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        (self.chunks.len() * (size_of::<Chunk>() + size_of::<Words>())) as u64
    }

    /// Whether it has none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether `unit` is in it.
    #[must_use]
    pub fn contains(&self, unit: u64) -> bool {
        self.word(unit).is_some_and(|(_, word)| word >> (unit % 64) & 1 == 1)
    }

    /// The chunk that `unit` falls into, and the word.
    fn word(&self, unit: u64) -> Option<(&Chunk, u64)> {
        let at = self.chunks.binary_search_by_key(&(unit / CHUNK_UNITS), |chunk| chunk.index).ok()?;
        let chunk = self.chunks.get(at)?;
        let inside = usize::try_from(unit % CHUNK_UNITS).ok()?;
        Some((chunk, *chunk.words.get(inside / 64)?))
    }

    /// How many units of the set lie before `unit`; `None` if `unit` is not in it.
    #[must_use]
    pub fn rank(&self, unit: u64) -> Option<u64> {
        let (chunk, word) = self.word(unit)?;
        if word >> (unit % 64) & 1 == 0 {
            return None;
        }
        let inside = usize::try_from(unit % CHUNK_UNITS).ok()? / 64;
        let group = inside / GROUP;
        let words = chunk.words.get(group * GROUP..inside)?;
        let whole = *chunk.groups.get(group)? + words.iter().map(|word| ones_in(*word)).sum::<u16>();
        Some(chunk.before + u64::from(whole + ones_in(word & ones(unit % 64))))
    }

    /// The unit with that rank.
    #[must_use]
    pub fn select(&self, rank: u64) -> Option<u64> {
        if rank >= self.len {
            return None;
        }
        let after = self.chunks.partition_point(|chunk| chunk.before <= rank);
        let chunk = self.chunks.get(after.checked_sub(1)?)?;
        let mut left = u16::try_from(rank - chunk.before).ok()?;
        let group = chunk.groups.partition_point(|before| *before <= left).checked_sub(1)?;
        left -= *chunk.groups.get(group)?;
        let words = chunk.words.iter().enumerate().skip(group * GROUP).take(GROUP);
        for (index, word) in words {
            let count = ones_in(*word);
            if left < count {
                return Some(chunk.index * CHUNK_UNITS + index as u64 * 64 + select_in(*word, left));
            }
            left -= count;
        }
        None
    }

    /// How many neighbouring units from `unit` on are in the set, as far as it takes no search: at most up
    /// to the end of its chunk, and 0 only if it is not in the set itself.
    #[must_use]
    pub fn run_from(&self, unit: u64) -> u64 {
        let at = self.chunks.binary_search_by_key(&(unit / CHUNK_UNITS), |chunk| chunk.index);
        let Some(chunk) = at.ok().and_then(|at| self.chunks.get(at)) else { return 0 };
        let mut count = 0;
        while unit % CHUNK_UNITS + count < CHUNK_UNITS {
            let next = unit % CHUNK_UNITS + count;
            let word = usize::try_from(next / 64).ok().and_then(|word| chunk.words.get(word));
            let left = 64 - next % 64;
            let ones = word.map_or(0, |word| u64::from((word >> (next % 64)).trailing_ones())).min(left);
            count += ones;
            if ones < left {
                break;
            }
        }
        count
    }

    /// How many neighbouring units from `unit` on are not in the set; `u64::MAX` less `unit` if none follows.
    #[must_use]
    pub fn gap_from(&self, unit: u64) -> u64 {
        let from = self.chunks.partition_point(|chunk| chunk.index < unit / CHUNK_UNITS);
        for chunk in self.chunks.get(from..).unwrap_or_default() {
            let start = chunk.index * CHUNK_UNITS;
            for (index, word) in chunk.words.iter().enumerate() {
                let first = start + index as u64 * 64;
                let skip = unit.saturating_sub(first);
                let word = if skip < 64 { *word >> skip << skip } else { 0 };
                if word != 0 {
                    return first + u64::from(word.trailing_zeros()) - unit;
                }
            }
        }
        u64::MAX - unit
    }

    /// Maximal runs of neighbouring units, `(first, count)`, in order.
    pub fn runs(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let mut pieces = self.chunks.iter().flat_map(|chunk| {
            chunk.words.iter().enumerate().flat_map(move |(index, word)| {
                word_runs(*word)
                    .map(move |(low, count)| (chunk.index * CHUNK_UNITS + index as u64 * 64 + low, count))
            })
        });
        let mut held: Option<(u64, u64)> = None;
        std::iter::from_fn(move || {
            for (first, count) in pieces.by_ref() {
                match held {
                    Some((start, length)) if start + length == first => held = Some((start, length + count)),
                    Some(done) => {
                        held = Some((first, count));
                        return Some(done);
                    }
                    None => held = Some((first, count)),
                }
            }
            held.take()
        })
    }
}

/// The runs of ones in a word.
fn word_runs(mut word: u64) -> impl Iterator<Item = (u64, u64)> {
    let mut base = 0u32;
    std::iter::from_fn(move || {
        if word == 0 {
            return None;
        }
        let skip = word.trailing_zeros();
        let count = (word >> skip).trailing_ones();
        let first = base + skip;
        base = first + count;
        word = word.checked_shr(skip + count).unwrap_or(0);
        Some((u64::from(first), u64::from(count)))
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::Collecting;

    proptest! {
        #[test]
        fn behaves_as_a_sorted_set(ranges in prop::collection::vec((0u64..20_000, 1u64..300), 0..30)) {
            let mut model = BTreeSet::new();
            let mut set = Collecting::default();
            for (first, count) in ranges {
                if (first..first + count).any(|unit| model.contains(&unit)) {
                    continue;
                }
                model.extend(first..first + count);
                prop_assert!(set.insert(first, count));
            }
            let set = set.finish();
            prop_assert_eq!(set.len(), model.len() as u64);
            for (rank, unit) in model.iter().enumerate() {
                prop_assert_eq!((set.rank(*unit), set.contains(*unit)), (Some(rank as u64), true));
                prop_assert_eq!(set.select(rank as u64), Some(*unit));
                let run = set.run_from(*unit);
                prop_assert!(run > 0 && (*unit..unit + run).all(|unit| model.contains(&unit)));
                prop_assert!(!model.contains(&(unit + run)) || (unit + run) % 4096 == 0);
            }
            prop_assert_eq!(set.select(set.len()), None);
            let listed: Vec<u64> = set.runs().flat_map(|(first, count)| first..first + count).collect();
            prop_assert_eq!(&listed, &model.iter().copied().collect::<Vec<_>>());
            let runs: Vec<_> = set.runs().collect();
            prop_assert!(runs.windows(2).all(|pair| pair[0].0 + pair[0].1 < pair[1].0), "not maximal");
            for unit in [0u64, 7, 4095, 4096, 9000, 25_000] {
                let next = model.range(unit..).next().copied().unwrap_or(u64::MAX);
                prop_assert_eq!(set.gap_from(unit), next - unit);
            }
            for gap in [0u64, 7, 4095, 4096, 25_000] {
                if !model.contains(&gap) {
                    prop_assert_eq!((set.rank(gap), set.run_from(gap), set.contains(gap)), (None, 0, false));
                }
            }
        }
    }

    #[test]
    fn a_unit_taken_twice_is_noticed() {
        let mut set = Collecting::default();
        assert!(set.insert(10, 100));
        assert!(!set.insert(109, 1));
        let mut set = Collecting::default();
        assert!(set.insert(u64::MAX / 65_536, 1));
        assert_eq!(set.finish().len(), 1);
    }
}
