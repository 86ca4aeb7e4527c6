//! Mount prefixes: under which directories hosts and system VMs mount a store of a given URL.
//!
//! Both are `/mnt` paths that end in a version-3 UUID made of the URL, so one URL in the configuration is
//! enough to understand every backing name that CloudStack wrote while the store had that URL:
//!
//! - KVM host: `/mnt/<uuid(host + path)>`, host as written, each `//` of the path made `/`
//!   (`KVMStoragePoolManager.getStoragePoolByURI`, `LibvirtStorageAdaptor`).
//! - Secondary storage VM: `/mnt/SecStorage/<uuid("<ip>:<path>")>`, the path as it is
//!   (`NfsSecondaryStorageResource.mountUri`). It resolves the host's name; here nothing is looked up, so
//!   the prefix is known only if the URL has an address.

use std::fmt;

use std::net::{IpAddr, Ipv6Addr};

use md5::{Digest as _, Md5};
use uuid::Uuid;

/// Java's `UUID.nameUUIDFromBytes`: a version-3 UUID over the bare bytes, without a namespace.
#[must_use]
pub fn name_uuid(bytes: &[u8]) -> Uuid {
    uuid::Builder::from_md5_bytes(Md5::digest(bytes).into()).into_uuid()
}

/// The URL of a store, as CloudStack has it: `nfs://host/path`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct StoreUrl {
    /// Host as written, in brackets if it is an IPv6 address.
    host: String,
    /// Path, percent signs decoded, with its leading slash.
    path: String,
}

/// Why a text is no store's URL.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{url:?} is no URL of a store: {reason}")]
pub struct UrlError {
    /// The text.
    pub url: String,
    /// What is wrong with it.
    pub reason: &'static str,
}

impl StoreUrl {
    /// Parses `nfs://host[:port]/path`. User name, port, query and fragment do not enter the prefixes, as
    /// in CloudStack, and are dropped.
    pub fn parse(url: &str) -> Result<Self, UrlError> {
        let fail = |reason| UrlError { url: url.to_owned(), reason };
        let (scheme, rest) = url.split_once("://").ok_or_else(|| fail("it has no scheme"))?;
        if !scheme.eq_ignore_ascii_case("nfs") && !scheme.eq_ignore_ascii_case("NetworkFilesystem") {
            return Err(fail("only nfs:// is known"));
        }
        let rest = rest.split(['?', '#']).next().unwrap_or_default();
        let (authority, path) =
            rest.find('/').map(|slash| rest.split_at(slash)).ok_or_else(|| fail("it has no path"))?;
        let host = authority.rsplit('@').next().unwrap_or_default();
        let host = match host.find(']') {
            Some(end) if host.starts_with('[') => &host[..=end],
            _ => host.split(':').next().unwrap_or_default(),
        };
        if host.is_empty() {
            return Err(fail("it has no host"));
        }
        let path = percent_decoded(path).ok_or_else(|| fail("its path is not UTF-8 when decoded"))?;
        if host.chars().chain(path.chars()).any(char::is_control) {
            return Err(fail("it has control characters"));
        }
        Ok(Self { host: host.to_owned(), path })
    }

    /// Where a KVM host mounts it.
    #[must_use]
    pub fn host_prefix(&self) -> String {
        let path = self.path.replace("//", "/");
        format!("/mnt/{}", name_uuid(format!("{}{path}", self.host).as_bytes()))
    }

    /// Where the secondary storage VM mounts it; `None` if the host is a name, which only that VM resolves.
    #[must_use]
    pub fn system_vm_prefix(&self) -> Option<String> {
        let address = self.host.trim_matches(['[', ']']).parse().ok()?;
        let name = format!("{}:{}", java_address(address), self.path);
        Some(format!("/mnt/SecStorage/{}", name_uuid(name.as_bytes())))
    }

    /// Whether two URLs name one export: case of the host, doubled and trailing slashes do not matter.
    #[must_use]
    pub fn same_export(&self, other: &Self) -> bool {
        let parts = |url: &Self| -> Vec<String> {
            url.path.split('/').filter(|part| !part.is_empty()).map(str::to_owned).collect()
        };
        self.host.eq_ignore_ascii_case(&other.host) && parts(self) == parts(other)
    }
}

/// The URL as [`StoreUrl::parse`] reads it, without what it drops.
impl fmt::Display for StoreUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = self.path.replace('%', "%25").replace('?', "%3F").replace('#', "%23");
        write!(f, "nfs://{}{path}", self.host)
    }
}

/// An address as Java's `InetAddress.getHostAddress` writes it: IPv6 without `::`, mapped IPv4 as IPv4.
fn java_address(address: IpAddr) -> String {
    let long = |six: Ipv6Addr| six.segments().map(|segment| format!("{segment:x}")).join(":");
    match address.to_canonical() {
        IpAddr::V4(four) => four.to_string(),
        IpAddr::V6(six) => long(six),
    }
}

/// `%41` is `A`; a `%` without two hex digits stays.
fn percent_decoded(text: &str) -> Option<String> {
    let digit = |byte: Option<&u8>| byte.and_then(|byte| char::from(*byte).to_digit(16));
    let bytes = text.as_bytes();
    let (mut decoded, mut at) = (Vec::with_capacity(bytes.len()), 0);
    while let Some(byte) = bytes.get(at) {
        let escape = digit(bytes.get(at + 1)).zip(digit(bytes.get(at + 2)));
        match escape.and_then(|(high, low)| u8::try_from(high * 16 + low).ok()) {
            Some(value) if *byte == b'%' => {
                decoded.push(value);
                at += 3;
            }
            _ => {
                decoded.push(*byte);
                at += 1;
            }
        }
    }
    String::from_utf8(decoded).ok()
}

#[cfg(test)]
mod tests {
    use super::{StoreUrl, name_uuid};

    fn url(text: &str) -> StoreUrl {
        StoreUrl::parse(text).unwrap()
    }

    /// Values of Java's own `UUID.nameUUIDFromBytes`.
    #[test]
    fn name_uuids_are_javas() {
        assert_eq!(name_uuid(b"hello").to_string(), "5d41402a-bc4b-3a76-b971-9d911017c592");
        assert_eq!(name_uuid(b"").to_string(), "d41d8cd9-8f00-3204-a980-0998ecf8427e");
    }

    #[test]
    fn both_prefixes_of_a_url() {
        let store = url("nfs://10.1.2.3/export/sec1");
        assert_eq!(store.host_prefix(), format!("/mnt/{}", name_uuid(b"10.1.2.3/export/sec1")));
        assert_eq!(
            store.system_vm_prefix(),
            Some(format!("/mnt/SecStorage/{}", name_uuid(b"10.1.2.3:/export/sec1")))
        );
        let named = url("NFS://nas.Example.org/export//sec1");
        assert_eq!(named.host_prefix(), format!("/mnt/{}", name_uuid(b"nas.Example.org/export/sec1")));
        assert_eq!(named.system_vm_prefix(), None);
    }

    #[test]
    fn details_follow_java() {
        // The host's prefix has each "//" replaced once, the system VM's not at all.
        let doubled = url("nfs://10.1.2.3//export///sec");
        assert_eq!(doubled.host_prefix(), format!("/mnt/{}", name_uuid(b"10.1.2.3/export//sec")));
        assert_eq!(
            doubled.system_vm_prefix(),
            Some(format!("/mnt/SecStorage/{}", name_uuid(b"10.1.2.3://export///sec")))
        );
        let six = url("nfs://[2001:db8::1]:2049/e");
        assert_eq!(six.host_prefix(), format!("/mnt/{}", name_uuid(b"[2001:db8::1]/e")));
        assert_eq!(
            six.system_vm_prefix(),
            Some(format!("/mnt/SecStorage/{}", name_uuid(b"2001:db8:0:0:0:0:0:1:/e")))
        );
        assert_eq!(url("nfs://u@h:2049/a%20b%zz?x#y"), url("nfs://h/a b%zz"));
        assert_ne!(url("nfs://h/a"), url("nfs://h/a/"));
    }

    #[test]
    fn one_export_has_many_spellings() {
        assert!(url("nfs://NAS/export/sec1/").same_export(&url("nfs://nas//export/sec1")));
        assert!(!url("nfs://nas/export/sec1").same_export(&url("nfs://nas/export/sec2")));
        assert!(!url("nfs://nas/export").same_export(&url("nfs://10.0.0.1/export")));
    }

    #[test]
    fn what_is_no_url_is_refused() {
        for bad in
            ["", "/mnt/x", "nfs://", "nfs://host", "nfs:///path", "cifs://h/p", "nfs://h/%ff", "nfs://h/%00"]
        {
            assert!(StoreUrl::parse(bad).is_err(), "{bad}");
        }
    }
}
