//! Choices that a seed decides.

use super::super::builder::mix;

/// A row of choices.
#[derive(Clone, Debug)]
pub struct Dice {
    seed: u64,
    count: u64,
}

impl Dice {
    pub fn new(seed: u64) -> Self {
        Self { seed, count: 0 }
    }

    pub fn roll(&mut self) -> u64 {
        self.count += 1;
        mix(self.seed, self.count)
    }

    /// Evenly from 0 up to `end`, that left out.
    pub fn below(&mut self, end: u64) -> u64 {
        (self.roll() >> 11) % end.max(1)
    }

    /// True once in so many times.
    pub fn once_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }

    pub fn pick<T: Clone>(&mut self, from: &[T]) -> T {
        from[usize::try_from(self.below(from.len() as u64)).unwrap()].clone()
    }
}
