//! The configuration as values: every documented key, and no other. Pure.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::values;
use crate::ops::copy::Reuse;
use crate::service::schedule::{self, Window};

/// The whole configuration.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// `[[stores]]`
    pub stores: Vec<StoreSettings>,
    /// `[safety]`
    pub safety: Safety,
    /// `[limits]`
    pub limits: Limits,
    /// `[policy]`
    pub policy: Policy,
    /// `[schedule]`
    pub schedule: Schedule,
    /// `[server]`
    pub server: Server,
    /// `[zones.NAME]`
    pub zones: BTreeMap<String, Zone>,
}

/// One of `[[stores]]`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StoreSettings {
    /// Its name on the command line; the directory's base name if there is none.
    pub id: Option<String>,
    /// The mount.
    pub path: Option<PathBuf>,
    /// What CloudStack has.
    pub url: Option<String>,
    /// More prefixes of backing names.
    #[serde(default)]
    pub aliases: Vec<String>,
    /// How backing names are written.
    #[serde(default)]
    pub backing: Backing,
    /// Whose layout of directories it has.
    #[serde(default)]
    pub layout: Directories,
}

/// How backing names are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Backing {
    /// The bare file name where it resolves.
    #[default]
    Relative,
    /// As the child had it.
    Keep,
}

/// Whose layout of directories a store has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Directories {
    /// Secondary storage.
    #[default]
    Secondary,
    /// Primary storage: `snapshots/<uuid>`.
    Primary,
}

/// `[safety]`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Safety {
    /// How long a file without checkpoints must have been left alone.
    pub settle: Span,
    /// When another instance's lease is taken for abandoned.
    pub lease: Span,
    /// When `in-place` may be chosen.
    pub in_place: InPlace,
    /// How long old files are kept.
    pub retention: Span,
    /// How long a deleted file keeps its name; none is `auto`.
    pub reader_grace: Grace,
    /// Who else compares before a purge.
    pub witness: Witness,
}

impl Default for Safety {
    fn default() -> Self {
        Self {
            settle: Span(Duration::from_mins(2)),
            lease: Span(Duration::from_secs(15)),
            in_place: InPlace::Auto,
            retention: Span(Duration::from_hours(24)),
            reader_grace: Grace(None),
            witness: Witness::None,
        }
    }
}

/// When `in-place` may be chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum InPlace {
    /// Where it is cheapest.
    Auto,
    /// Where there is no room for another way.
    NoSpace,
    /// Never.
    Never,
}

/// Who else compares before a purge.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Witness {
    /// Nobody.
    None,
    /// QEMU.
    QemuImg,
}

/// `[limits]`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// How many trees are worked on at once.
    pub jobs: usize,
    /// Bytes a second; 0 for no limit.
    pub rate: Rate,
}

impl Default for Limits {
    fn default() -> Self {
        Self { jobs: 4, rate: Rate(0) }
    }
}

/// `[policy]`: how chains should be; `audit` tells which are not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Policy {
    /// The most members of a chain, its full base among them; 0 for no limit.
    pub max_length: usize,
    /// How old the full base of a chain may be; 0 for no limit.
    pub max_base_age: Span,
    /// The most bytes that deleted members of a chain hold; 0 for no limit.
    pub max_pinned_bytes: Size,
    /// What the service does with members that CloudStack has deleted.
    pub reclaim: Reclaim,
}

/// What the service does with members that CloudStack has deleted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reclaim {
    /// Nothing.
    #[default]
    Off,
    /// It tells what could be merged.
    Report,
    /// It merges them.
    Auto,
}

impl From<Reclaim> for schedule::Reclaim {
    fn from(reclaim: Reclaim) -> Self {
        match reclaim {
            Reclaim::Off => Self::Off,
            Reclaim::Report => Self::Report,
            Reclaim::Auto => Self::Auto,
        }
    }
}

impl Default for Policy {
    /// CloudStack's own limit (`snapshot.delta.max`) is 16, often raised; QEMU's is some 900 members. Between the
    /// two: whoever raised the first is warned long before the second.
    fn default() -> Self {
        Self {
            max_length: 64,
            max_base_age: Span(Duration::ZERO),
            max_pinned_bytes: Size(0),
            reclaim: Reclaim::Off,
        }
    }
}

/// `[schedule]`: what the service begins by itself.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Schedule {
    /// Within what time every byte of adopted members is read; 0 for never.
    pub verify_within: Span,
    /// With how many bytes a second at most; 0 for no limit beside `limits.rate`.
    pub verify_rate: Rate,
    /// How often what is due is ended: names after their grace, old files after their retention; 0 for never.
    pub purge_every: Span,
    /// How often CloudStack's rows are looked at for `policy.reclaim`.
    pub reclaim_every: Span,
    /// When `policy.reclaim` may begin merges, in UTC.
    pub window: Hours,
    /// The file with CloudStack's rows.
    pub records: Option<PathBuf>,
}

impl Default for Schedule {
    fn default() -> Self {
        Self {
            verify_within: Span(Duration::ZERO),
            verify_rate: Rate(0),
            purge_every: Span(Duration::ZERO),
            reclaim_every: Span(Duration::from_hours(1)),
            window: Hours(None),
            records: None,
        }
    }
}

/// Hours of the day as text; empty for all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hours(pub Option<Window>);

/// `[server]`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Server {
    /// Where the service listens.
    pub listen: String,
    /// The file of bearer tokens.
    pub tokens: Option<PathBuf>,
    /// The certificate of the service, a PEM file, with those between it and the root; none for plain HTTP.
    pub certificate: Option<PathBuf>,
    /// Its private key, a PEM file.
    pub key: Option<PathBuf>,
    /// Where caches are kept.
    pub cache: Option<PathBuf>,
    /// The one directory of this host into which jobs may write images.
    pub exports: Option<PathBuf>,
    /// How many connections are open at once, at most.
    pub connections: usize,
    /// How long finished jobs are kept.
    pub keep_jobs: Span,
    /// Who wakes and spreads several instances.
    pub coordinator: Option<String>,
}

impl Default for Server {
    fn default() -> Self {
        Self {
            listen: "127.0.0.1:7420".to_owned(),
            tokens: None,
            certificate: None,
            key: None,
            cache: None,
            exports: None,
            connections: 16_384,
            keep_jobs: Span(Duration::from_hours(7 * 24)),
            coordinator: None,
        }
    }
}

/// One of `[zones.NAME]`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Zone {
    /// The peer's address.
    pub url: String,
    /// The file with the token to show there.
    pub token_file: Option<PathBuf>,
    /// The certificate that its own must lead to, a PEM file.
    pub certificate: Option<PathBuf>,
    /// What blocks are looked for in here, before the peer is asked for them.
    #[serde(default)]
    pub reuse: Reuse,
}

impl Zone {
    /// With its name.
    pub fn named(&self, name: &str) -> crate::peer::Zone {
        let Self { url, token_file, certificate, reuse } = self.clone();
        crate::peer::Zone { name: name.to_owned(), url, token_file, certificate, reuse }
    }
}

/// A duration as text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span(pub Duration);

/// `auto`, or a duration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grace(pub Option<Duration>);

/// Bytes as text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size(pub u64);

/// Bytes a second as text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate(pub u64);

fn text<'de, D: Deserializer<'de>, T>(
    from: D,
    parse: impl Fn(&str) -> Result<T, String>,
) -> Result<T, D::Error> {
    let text = String::deserialize(from)?;
    parse(&text).map_err(serde::de::Error::custom)
}

impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        text(from, values::duration).map(Self)
    }
}

impl<'de> Deserialize<'de> for Grace {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        text(from, |text| if text == "auto" { Ok(None) } else { values::duration(text).map(Some) }).map(Self)
    }
}

impl<'de> Deserialize<'de> for Hours {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        text(from, |text| if text.is_empty() { Ok(None) } else { Window::parse(text).map(Some) }).map(Self)
    }
}

impl Serialize for Hours {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        match self.0 {
            Some(window) => to.collect_str(&window),
            None => to.serialize_str(""),
        }
    }
}

impl<'de> Deserialize<'de> for Rate {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        text(from, values::rate).map(Self)
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        text(from, values::size).map(Self)
    }
}

impl Serialize for Size {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(&format_args!("{}B", self.0))
    }
}

impl Serialize for Span {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(&humantime::format_duration(self.0))
    }
}

impl Serialize for Grace {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        match self.0 {
            None => to.serialize_str("auto"),
            Some(grace) => Span(grace).serialize(to),
        }
    }
}

impl Serialize for Rate {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(&format_args!("{}B/s", self.0))
    }
}

impl Settings {
    /// Reads the text of a configuration file.
    pub fn parse(text: &str) -> Result<Self, toml::de::Error> {
        toml::from_str(text)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{Grace, InPlace, Settings};

    const DOCUMENTED: &str = r#"
        [[stores]]
        id = "sec1"
        path = "/mnt/secondary"
        url = "nfs://nas.example.org/export/sec1"
        aliases = ["/mnt/11111111-2222-3333-8444-555555555555"]
        backing = "relative"
        [safety]
        settle = "2m"
        lease = "15s"
        in_place = "auto"
        retention = "24h"
        reader_grace = "auto"
        witness = "none"
        [limits]
        jobs = 4
        rate = "0"
        [policy]
        max_length = 64
        max_base_age = "0"
        max_pinned_bytes = "0"
        reclaim = "off"
        [schedule]
        verify_within = "0"
        window = "01:00-05:00"
        [server]
        listen = "127.0.0.1:7420"
        tokens = "/etc/qchain/tokens"
        cache = "/var/cache/qchain"
        [zones.east]
        url = "https://qchain.east.example.org:7420"
        token_file = "/etc/qchain/east.token"
        certificate = "/etc/qchain/east.pem"
        reuse = "chain"
    "#;

    #[test]
    fn the_documented_file_is_what_the_defaults_are() {
        let settings = Settings::parse(DOCUMENTED).unwrap();
        assert_eq!(settings.stores.len(), 1);
        assert_eq!(settings.safety.settle, super::Safety::default().settle);
        assert_eq!(settings.safety.retention.0, Duration::from_hours(24));
        assert_eq!(settings.safety.reader_grace, Grace(None));
        assert_eq!(settings.safety.in_place, InPlace::Auto);
        assert_eq!(settings.policy, super::Policy::default());
        assert_eq!(settings.zones["east"].reuse, super::Reuse::default());
        // What `config check` prints can be read again.
        let printed = toml::to_string(&settings).unwrap();
        assert!(Settings::parse(&printed).is_ok(), "{printed}");
    }

    #[test]
    fn unknown_keys_and_bad_values_are_errors() {
        for bad in [
            "[safety]\nsettel = \"2m\"",
            "[other]",
            "[safety]\nsettle = 5",
            "[limits]\nrate = \"x\"",
            "[policy]\nmax_len = 3",
            "[policy]\nreclaim = \"sometimes\"",
            "[schedule]\nwindow = \"1-5\"",
            "[zones.east]\nurl = \"https://a\"\nreuse = \"everybody\"",
        ] {
            assert!(Settings::parse(bad).is_err(), "{bad}");
        }
        assert!(Settings::parse("").is_ok());
    }
}
