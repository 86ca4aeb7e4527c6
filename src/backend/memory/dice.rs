//! Choices that a seed decides, the same on every machine.

/// A source of choices.
#[derive(Debug)]
pub(super) struct Dice {
    state: u64,
    /// How many of eight changes are kept.
    kept: u64,
}

impl Dice {
    /// The seed also decides how much is kept, from all to nothing: with an even chance for each, a long
    /// row of changes would hardly ever be kept or lost as a whole.
    pub(super) fn new(seed: u64) -> Self {
        let mut dice = Self { state: seed, kept: 0 };
        dice.kept = dice.roll() % 9;
        dice
    }

    /// The next of an even distribution (splitmix64).
    pub(super) fn roll(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    /// Whether the next change is kept.
    pub(super) fn keeps(&mut self) -> bool {
        self.roll() % 8 < self.kept
    }
}
