//! URLs that need no token: what they grant stands in them, signed.

use subtle::ConstantTimeEq as _;

use crate::service::jobs::request::Format;

/// What a URL grants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    /// The member, by its full name.
    pub member: String,
    /// The format of the image.
    pub format: Format,
    /// The name of the file, the last part of the path.
    pub file: String,
    /// Until when, in seconds since 1970.
    pub expires: u64,
}

/// The key of all URLs.
pub struct UrlKey([u8; 32]);

impl UrlKey {
    /// One that is kept.
    pub fn new(key: [u8; 32]) -> Self {
        Self(key)
    }

    /// One for this process alone.
    pub fn random() -> Self {
        let random = [uuid::Uuid::new_v4().into_bytes(), uuid::Uuid::new_v4().into_bytes()].concat();
        Self(blake3::derive_key("qchain 2026 key of signed URLs", &random))
    }

    fn hash(&self, grant: &Grant) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new_keyed(&self.0);
        hasher.update(b"qchain download 1");
        for part in [&grant.member, &grant.file, grant.format.word()] {
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part.as_bytes());
        }
        hasher.update(&grant.expires.to_le_bytes());
        hasher.finalize()
    }

    /// The signature: 64 hex digits.
    pub fn sign(&self, grant: &Grant) -> String {
        self.hash(grant).to_hex().to_string()
    }

    /// Whether that is the signature. Takes as long whatever it is, if it is one at all.
    pub fn fits(&self, grant: &Grant, signature: &str) -> bool {
        let given = blake3::Hash::from_hex(signature);
        given.is_ok_and(|given| self.hash(grant).as_bytes().ct_eq(given.as_bytes()).into())
    }
}

#[cfg(test)]
mod tests {
    use super::{Grant, UrlKey};
    use crate::service::jobs::request::Format;

    #[test]
    fn a_signature_fits_its_grant_alone() {
        let grant = |member: &str, file: &str, format, expires| Grant {
            member: member.to_owned(),
            file: file.to_owned(),
            format,
            expires,
        };
        let key = UrlKey::new([7; 32]);
        let good = grant("a/b", "b.raw", Format::Raw, 5);
        let signature = key.sign(&good);
        assert!(key.fits(&good, &signature));
        for other in [
            grant("a/bb", ".raw", Format::Raw, 5),
            grant("a/c", "b.raw", Format::Raw, 5),
            grant("a/b", "b.raw", Format::Qcow2, 5),
            grant("a/b", "b.raw", Format::Raw, 6),
        ] {
            assert!(!key.fits(&other, &signature), "{other:?}");
        }
        assert!(!key.fits(&good, "") && !key.fits(&good, &"0".repeat(64)));
        assert!(!UrlKey::new([8; 32]).fits(&good, &signature));
        assert!(!UrlKey::random().fits(&good, &signature));
    }
}
