//! The URL of an export: `nfs://host[:port]/export[?uid=&gid=&mountport=&timeout=&connections=]`. Pure.

use std::fmt;
use std::time::Duration;

/// Where NFS servers listen.
const NFS_PORT: u16 = 2049;
/// How long a call may take in all, if nothing is said.
const TIMEOUT: Duration = Duration::from_mins(1);
/// The longest time that may be asked for.
const MAX_TIMEOUT: Duration = Duration::from_hours(1);
/// The longest path that the protocol can mount (`MNTPATHLEN`).
const MAX_EXPORT_BYTES: usize = 1024;
/// How many connections there may be, at least and at most.
const CONNECTIONS: std::ops::RangeInclusive<usize> = 2..=8;

/// Where an export is, and as whom it is read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NfsUrl {
    /// A name or an address, without brackets.
    pub host: String,
    /// The port of the NFS service.
    pub port: u16,
    /// The port of the mount service; the server's portmapper is asked if there is none.
    pub mount_port: Option<u16>,
    /// The exported directory, with its leading slash and without one at its end.
    pub export: String,
    /// The user to be for the server; this process's if there is none.
    pub uid: Option<u32>,
    /// The group to be for the server; this process's if there is none.
    pub gid: Option<u32>,
    /// How long a call may take in all, with everything that is tried.
    pub timeout: Duration,
    /// The most connections.
    pub connections: usize,
}

/// Why a text is no [`NfsUrl`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{url:?} names no export: {reason}")]
pub struct UrlError {
    /// The text.
    pub url: String,
    /// What is wrong with it.
    pub reason: String,
}

impl NfsUrl {
    /// Parses a URL. `%41` in the path is `A`; IPv6 addresses stand in brackets; `timeout` is in seconds, or
    /// like `90s`; `connections` is 2 to 8. Unknown options are errors.
    pub fn parse(text: &str) -> Result<Self, UrlError> {
        let fail = |reason: String| UrlError { url: text.to_owned(), reason };
        let (scheme, rest) = text.split_once("://").ok_or_else(|| fail("it has no scheme".to_owned()))?;
        if !scheme.eq_ignore_ascii_case("nfs") {
            return Err(fail(format!("{scheme}:// is not nfs://")));
        }
        let (place, options) = rest.split_once('?').map_or((rest, ""), |(place, options)| (place, options));
        let slash = place.find('/').ok_or_else(|| fail("it has no path".to_owned()))?;
        let (authority, path) = place.split_at(slash);
        let (host, port) = host_and_port(authority).map_err(fail)?;
        let export = decoded(path).ok_or_else(|| fail("its path is not UTF-8".to_owned()))?;
        let export = format!("/{}", export.trim_matches('/'));
        if host.chars().chain(export.chars()).any(char::is_control) || export.len() > MAX_EXPORT_BYTES {
            return Err(fail("its path is too long, or has control characters".to_owned()));
        }
        let mut url = Self {
            host,
            port,
            mount_port: None,
            export,
            uid: None,
            gid: None,
            timeout: TIMEOUT,
            connections: *CONNECTIONS.end(),
        };
        for option in options.split('&').filter(|option| !option.is_empty()) {
            url.take(option).map_err(|reason| fail(format!("{option}: {reason}")))?;
        }
        Ok(url)
    }

    fn take(&mut self, option: &str) -> Result<(), String> {
        let (key, value) = option.split_once('=').ok_or("it has no value")?;
        match key {
            "uid" => self.uid = Some(number(value)?),
            "gid" => self.gid = Some(number(value)?),
            "mountport" => self.mount_port = Some(port_number(value)?),
            "timeout" => self.timeout = duration(value)?,
            "connections" => {
                self.connections = number(value)?;
                if !CONNECTIONS.contains(&self.connections) {
                    return Err("2 to 8 connections are possible".to_owned());
                }
            }
            _ => return Err("known are uid, gid, mountport, timeout and connections".to_owned()),
        }
        Ok(())
    }

    /// The last component of the export, the host for `/`: what a store is called if nobody says otherwise.
    #[must_use]
    pub fn name(&self) -> &str {
        match self.export.rsplit('/').next() {
            None | Some("") => &self.host,
            Some(name) => name,
        }
    }

    /// The host as it is written before a port.
    fn shown_host(&self) -> String {
        if self.host.contains(':') { format!("[{}]", self.host) } else { self.host.clone() }
    }

    /// The server, for messages.
    #[must_use]
    pub fn server(&self) -> String {
        format!("{}:{}", self.shown_host(), self.port)
    }
}

/// Without options.
impl fmt::Display for NfsUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let port = if self.port == NFS_PORT { String::new() } else { format!(":{}", self.port) };
        let export = self.export.replace('%', "%25").replace('?', "%3F").replace('#', "%23");
        write!(f, "nfs://{}{port}{export}", self.shown_host())
    }
}

fn host_and_port(authority: &str) -> Result<(String, u16), String> {
    let (host, port) = if let Some(inner) = authority.strip_prefix('[') {
        let (host, rest) = inner.split_once(']').ok_or("a bracket is not closed")?;
        match rest.strip_prefix(':') {
            Some(port) => (host, Some(port)),
            None if rest.is_empty() => (host, None),
            None => return Err("something stands behind the bracket".to_owned()),
        }
    } else {
        authority.split_once(':').map_or((authority, None), |(host, port)| (host, Some(port)))
    };
    if host.is_empty() || host.contains('@') {
        return Err("it has no host, or a user's name (uid= and gid= say who reads)".to_owned());
    }
    let port = port.map_or(Ok(NFS_PORT), port_number)?;
    Ok((host.to_owned(), port))
}

fn number<T: std::str::FromStr>(text: &str) -> Result<T, String> {
    text.parse().map_err(|_| format!("{text:?} is not a number that fits"))
}

fn port_number(text: &str) -> Result<u16, String> {
    match number(text)? {
        0 => Err("0 is no port".to_owned()),
        port => Ok(port),
    }
}

fn duration(text: &str) -> Result<Duration, String> {
    let span = match text.parse() {
        Ok(seconds) => Duration::from_secs(seconds),
        Err(_) => humantime::parse_duration(text).map_err(|error| error.to_string())?,
    };
    if span < Duration::from_secs(1) || span > MAX_TIMEOUT {
        return Err("1 second to 1 hour is possible".to_owned());
    }
    Ok(span)
}

/// `%41` is `A`; a `%` without two hex digits stays.
fn decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, behind)) = rest.split_first() {
        let escape = (first == b'%').then(|| behind.first_chunk::<2>()).flatten();
        let value = escape.and_then(|pair| std::str::from_utf8(pair).ok());
        let value = value.filter(|pair| pair.bytes().all(|byte| byte.is_ascii_hexdigit()));
        if let Some(value) = value.and_then(|pair| u8::from_str_radix(pair, 16).ok()) {
            bytes.push(value);
            rest = behind.get(2..).unwrap_or_default();
        } else {
            bytes.push(first);
            rest = behind;
        }
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::NfsUrl;

    fn url(text: &str) -> NfsUrl {
        NfsUrl::parse(text).unwrap()
    }

    #[test]
    fn a_url_is_taken_apart() {
        let plain = url("nfs://nas.example.org/export/sec1/");
        assert_eq!((plain.host.as_str(), plain.port, plain.mount_port), ("nas.example.org", 2049, None));
        assert_eq!((plain.export.as_str(), plain.name()), ("/export/sec1", "sec1"));
        assert_eq!((plain.timeout, plain.connections), (Duration::from_mins(1), 8));
        assert_eq!(plain.to_string(), "nfs://nas.example.org/export/sec1");
        let full = url("NFS://10.0.0.1:20490/a%20b?uid=5&gid=6&mountport=20491&timeout=90s&connections=2");
        assert_eq!((full.uid, full.gid, full.mount_port), (Some(5), Some(6), Some(20491)));
        assert_eq!((full.timeout, full.connections), (Duration::from_secs(90), 2));
        assert_eq!((full.to_string().as_str(), full.name()), ("nfs://10.0.0.1:20490/a b", "a b"));
        let six = url("nfs://[2001:db8::1]/e");
        assert_eq!((six.host.as_str(), six.server().as_str()), ("2001:db8::1", "[2001:db8::1]:2049"));
        assert_eq!(url("nfs://h/").name(), "h");
        assert_eq!(url("nfs://h/100%").export, "/100%");
    }

    #[test]
    fn what_is_none_is_refused() {
        for bad in [
            "/mnt/x",
            "nfs://host",
            "nfs:///e",
            "cifs://h/e",
            "nfs://h:0/e",
            "nfs://h:x/e",
            "nfs://[::1/e",
            "nfs://[::1]x/e",
            "nfs://u@h/e",
            "nfs://h/%ff",
            "nfs://h/%00",
            "nfs://h/e?uid",
            "nfs://h/e?uid=-1",
            "nfs://h/e?colour=red",
            "nfs://h/e?timeout=0",
            "nfs://h/e?timeout=2h",
            "nfs://h/e?connections=9",
        ] {
            assert!(NfsUrl::parse(bad).is_err(), "{bad}");
        }
    }
}
