//! Names, parsed once at the edge: a value of one of these types is safe to join to a store's root.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A path relative to a store's root: the install path of a member, or of one of qchain's own files.
///
/// Invariants: UTF-8; components separated by single `/`; no component is empty, `.` or `..`, none has a
/// NUL or control character, none is longer than 255 bytes; at most 4,095 bytes in all; the empty path is
/// the root itself.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct StorePath(String);

/// Why a text is no [`StorePath`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PathError {
    /// A component is empty, `.` or `..`, has a control character, or is too long.
    #[error("not a path inside a store: component {component:?} of {path:?}")]
    Component {
        /// The whole text.
        path: String,
        /// The component at fault.
        component: String,
    },
    /// Longer than 4,095 bytes.
    #[error("path of {length} bytes is too long")]
    TooLong {
        /// Its length in bytes.
        length: usize,
    },
}

impl StorePath {
    /// The store's root.
    #[must_use]
    pub fn root() -> Self {
        Self(String::new())
    }

    /// Parses a relative path; a leading or trailing `/` is an error like any other empty component.
    pub fn parse(text: &str) -> Result<Self, PathError> {
        if text.len() > 4095 {
            return Err(PathError::TooLong { length: text.len() });
        }
        if !text.is_empty() {
            for component in text.split('/') {
                check_component(text, component)?;
            }
        }
        Ok(Self(text.to_owned()))
    }

    /// The path with one more component.
    pub fn join(&self, component: &str) -> Result<Self, PathError> {
        check_component(component, component)?;
        let joined = if self.0.is_empty() { component.to_owned() } else { format!("{}/{component}", self.0) };
        if joined.len() > 4095 {
            return Err(PathError::TooLong { length: joined.len() });
        }
        Ok(Self(joined))
    }

    /// The directory it lies in; the root for a single component and for the root itself.
    #[must_use]
    pub fn parent(&self) -> Self {
        match self.0.rfind('/') {
            Some(slash) => Self(self.0[..slash].to_owned()),
            None => Self::root(),
        }
    }

    /// The last component, empty for the root.
    #[must_use]
    pub fn file_name(&self) -> &str {
        self.0.rfind('/').map_or(self.0.as_str(), |slash| &self.0[slash + 1..])
    }

    /// The path as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Its components, none for the root.
    pub fn components(&self) -> impl Iterator<Item = &str> {
        self.0.split('/').filter(|component| !component.is_empty())
    }

    /// Whether it is the root.
    #[must_use]
    pub fn is_root(&self) -> bool {
        self.0.is_empty()
    }
}

fn check_component(path: &str, component: &str) -> Result<(), PathError> {
    let bad = component.is_empty()
        || component == "."
        || component == ".."
        || component.len() > 255
        || component.chars().any(|c| c.is_control() || c == '/');
    if bad {
        return Err(PathError::Component { path: path.to_owned(), component: component.to_owned() });
    }
    Ok(())
}

impl TryFrom<String> for StorePath {
    type Error = PathError;
    fn try_from(text: String) -> Result<Self, Self::Error> {
        Self::parse(&text)
    }
}

impl From<StorePath> for String {
    fn from(path: StorePath) -> Self {
        path.0
    }
}

impl fmt::Display for StorePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_empty() { "." } else { &self.0 })
    }
}

/// A store's short name on the command line and in reports: `[A-Za-z0-9._-]`, 1 to 64 characters.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct StoreId(String);

/// Why a text is no [`StoreId`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no store id: 1 to 64 of letters, digits, '.', '_' and '-'")]
pub struct StoreIdError(pub String);

impl StoreId {
    /// Parses an id.
    pub fn parse(text: &str) -> Result<Self, StoreIdError> {
        let good = (1..=64).contains(&text.len())
            && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
        if good { Ok(Self(text.to_owned())) } else { Err(StoreIdError(text.to_owned())) }
    }

    /// The id as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for StoreId {
    type Error = StoreIdError;
    fn try_from(text: String) -> Result<Self, Self::Error> {
        Self::parse(&text)
    }
}

impl From<StoreId> for String {
    fn from(id: StoreId) -> Self {
        id.0
    }
}

impl fmt::Display for StoreId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A BLAKE3 digest, printed as 64 hex digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(try_from = "String", into = "String")]
#[schema(value_type = String)]
pub struct Digest(pub [u8; 32]);

/// Why a text is no [`Digest`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no digest: 64 lower-case hex digits")]
pub struct DigestError(pub String);

impl Digest {
    /// Parses 64 lower-case hex digits.
    pub fn parse(text: &str) -> Result<Self, DigestError> {
        let mut bytes = [0; 32];
        let lower = text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        if text.len() != 64 || !lower {
            return Err(DigestError(text.chars().take(80).collect()));
        }
        for (place, pair) in bytes.iter_mut().zip(text.as_bytes().chunks(2)) {
            let digits = std::str::from_utf8(pair).ok().and_then(|pair| u8::from_str_radix(pair, 16).ok());
            *place = digits.ok_or_else(|| DigestError(text.to_owned()))?;
        }
        Ok(Self(bytes))
    }
}

impl TryFrom<String> for Digest {
    type Error = DigestError;
    fn try_from(text: String) -> Result<Self, Self::Error> {
        Self::parse(&text)
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> Self {
        digest.to_string()
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::{StoreId, StorePath};

    #[test]
    fn store_paths_stay_inside() {
        for good in ["", "a", "snapshots/2/7/x", "a b", "ü"] {
            assert!(StorePath::parse(good).is_ok(), "{good}");
        }
        for bad in ["/a", "a/", "a//b", "..", "a/../b", ".", "a/./b", "a\0b", "a\nb"] {
            assert!(StorePath::parse(bad).is_err(), "{bad:?}");
        }
        assert!(StorePath::parse(&"x".repeat(256)).is_err());
        assert!(StorePath::parse(&vec!["x"; 2049].join("/")).is_err());
    }

    #[test]
    fn parent_and_name() {
        let path = StorePath::parse("snapshots/2/7/x").unwrap();
        assert_eq!(path.parent().as_str(), "snapshots/2/7");
        assert_eq!(path.file_name(), "x");
        assert_eq!(StorePath::parse("x").unwrap().parent(), StorePath::root());
        assert!(path.join("y/z").is_err());
        assert_eq!(path.components().count(), 4);
    }

    #[test]
    fn store_ids() {
        assert!(StoreId::parse("sec-1.a_b").is_ok());
        assert!(StoreId::parse("a:b").is_err());
        assert!(StoreId::parse("").is_err());
    }
}
