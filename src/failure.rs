//! The few ways in which anything here can fail, and the stable codes that name the reasons.
//!
//! Each layer has its own error enum and maps it to a [`Kind`] (which decides the exit code and the HTTP
//! status, one exhaustive match each) and to a [`Code`] (which `qchain explain` knows). A check that found
//! damage is not a failure: damage is data, carried in findings under the same codes.

mod code;

pub use code::{Code, Severity};

/// What kind of failure a command ends with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// Damage was found by a check.
    Damage,
    /// The call itself is wrong: an unknown flag, an ambiguous member.
    Usage,
    /// Understood and not done, because it would be unsafe or conflicts with something.
    Refused,
    /// What was named does not exist.
    NotFound,
    /// Something else uses it now; later may be fine.
    Busy,
    /// The image is corrupt, or uses a feature that is not supported.
    Corrupt,
    /// Not enough space.
    NoSpace,
    /// Input, output or a peer failed.
    Io,
    /// The user asked to stop.
    Cancelled,
}

impl Kind {
    /// The process's exit code (design, section 7).
    #[must_use]
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Damage => 1,
            Self::Usage => 2,
            Self::Refused => 3,
            Self::NotFound => 4,
            Self::Busy => 5,
            Self::Corrupt => 6,
            Self::NoSpace => 7,
            Self::Io => 8,
            Self::Cancelled => 130,
        }
    }

    /// The word that `--json` shows.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Damage => "damage",
            Self::Usage => "usage",
            Self::Refused => "refused",
            Self::NotFound => "not-found",
            Self::Busy => "busy",
            Self::Corrupt => "corrupt",
            Self::NoSpace => "no-space",
            Self::Io => "io",
            Self::Cancelled => "cancelled",
        }
    }
}

/// What every layer's error can tell, so that the edges (terminal, HTTP) need to know no layer's enum.
pub trait Failure: std::error::Error {
    /// Which kind of failure it is.
    fn kind(&self) -> Kind;
    /// The stable reason code.
    fn code(&self) -> Code;
    /// The member it is about, as its install path, where there is one.
    fn member(&self) -> Option<&str> {
        None
    }
}

/// An error with its causes, on one line. A cause that only says what the error said is left out.
#[must_use]
pub fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut last = text.clone();
    for cause in std::iter::successors(error.source(), |error| error.source()) {
        let next = cause.to_string();
        if next != last {
            text.push_str(": ");
            text.push_str(&next);
        }
        last = next;
    }
    text
}
