//! Downloads: a member's image at a URL of its own, by any range, with no file in between.
//!
//! | module | owns |
//! |---|---|
//! | [`sign`] | what a URL grants, and its signature |
//! | [`range`] | what of an image a request's headers want |
//! | [`opened`] | images that are open, so that many requests of one share what was found out once |
//! | [`body`] | the bytes: read slice by slice, a slice ahead of the client |
//!
//! Memory: a download has two slices, which are the smaller the more downloads there are; so many slices are read at
//! once and no more. Files: of at most [`opened::MOST`] images beside those that are being sent.

pub mod body;
pub mod opened;
pub mod range;
pub mod sign;

use std::sync::{Arc, OnceLock};

use tokio::sync::Semaphore;

use super::config::Config;
use super::jobs::request::Format;
use crate::ops::{OpError, Result};
use crate::store::Stores;
use crate::store::url_key::url_key;
use opened::OpenImages;
use sign::UrlKey;

/// How many downloads there may be at once.
const MOST: usize = 1024;
/// How many slices are read at once: each is read by all processors.
const TURNS: usize = 4;

/// All downloads of this process.
pub struct Downloads {
    key: OnceLock<UrlKey>,
    pub images: OpenImages,
    places: Arc<Semaphore>,
    turns: Arc<Semaphore>,
}

impl Downloads {
    pub fn new() -> Self {
        Self {
            key: OnceLock::new(),
            images: OpenImages::default(),
            places: Arc::new(Semaphore::new(MOST)),
            turns: Arc::new(Semaphore::new(TURNS)),
        }
    }

    /// The key of all URLs. Blocks, the first time.
    pub fn key(&self, config: &Config, stores: &Stores) -> Result<&UrlKey> {
        if let Some(key) = self.key.get() {
            return Ok(key);
        }
        let kept = url_key(stores, config.cache.as_deref(), !config.read_only).map_err(OpError::from)?;
        if kept.is_none() {
            tracing::warn!("there is no place for the key of signed URLs: they end with this process");
        }
        Ok(self.key.get_or_init(|| kept.map_or_else(UrlKey::random, UrlKey::new)))
    }

    /// How many bytes are read at once for one of the downloads that there are now.
    fn slice_bytes(&self) -> u64 {
        let active = MOST.saturating_sub(self.places.available_permits()).max(1) as u64;
        let share = (body::ALL_BYTES / active).clamp(body::LEAST_SLICE, body::MOST_SLICE);
        1 << share.ilog2()
    }
}

/// The name of the file that is offered to whoever saves it: no path, no character that means something.
pub fn file_name(member: &str, format: Format) -> String {
    let last = member.rsplit(['/', ':']).next().unwrap_or_default();
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    let name: String =
        last.bytes().map(|byte| if plain(byte) { char::from(byte) } else { '_' }).take(200).collect();
    format!("{}.{}", name.trim_start_matches('.'), format.word())
}

#[cfg(test)]
mod tests {
    use super::file_name;
    use crate::service::jobs::request::Format;

    #[test]
    fn names_of_files_are_harmless() {
        assert_eq!(file_name("s1:snapshots/2/7/a-b", Format::Raw), "a-b.raw");
        assert_eq!(file_name("x/..\"\r\né", Format::Qcow2), "_____.qcow2");
    }
}
