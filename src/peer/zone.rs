//! What the configuration says of another zone.

use std::io::Read as _;
use std::path::PathBuf;

use hyper::Uri;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;

use crate::ops::copy::Reuse;
use crate::ops::copy::plan::usage;
use crate::ops::{OpError, Result};

/// The longest token, in bytes.
const MAX_TOKEN: u64 = 4096;

/// Another zone.
#[derive(Clone, Debug)]
pub struct Zone {
    /// What it is called here.
    pub name: String,
    /// `https://HOST[:PORT]`; `http://` for this host alone.
    pub url: String,
    /// The file with the token to show there.
    pub token_file: Option<PathBuf>,
    /// The certificate that its own must lead to, a PEM file.
    pub certificate: Option<PathBuf>,
    /// What blocks are looked for in here, before it is asked for them.
    pub reuse: Reuse,
}

/// Where a zone's service is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    /// A name, or an address without brackets.
    pub host: String,
    /// The port.
    pub port: u16,
    /// Over TLS.
    pub tls: bool,
}

impl Zone {
    fn bad(&self, detail: &str) -> OpError {
        usage(format!("[zones.{}]: {detail}", self.name))
    }

    /// Reads the URL.
    ///
    /// # Errors
    ///
    /// A usage error for what is none, or is neither `https` nor this very host: a token would cross the network bare.
    pub fn address(&self) -> Result<Address> {
        let uri: Uri = self.url.parse().map_err(|_| self.bad("its url is none"))?;
        let tls = match uri.scheme_str() {
            Some("https") => true,
            Some("http") => false,
            _ => return Err(self.bad("its url begins with neither https:// nor http://")),
        };
        let authority = uri.authority().filter(|authority| !authority.as_str().contains('@'));
        let host = authority.map(|authority| authority.host().trim_matches(['[', ']']).to_owned());
        let host =
            host.filter(|host| !host.is_empty()).ok_or_else(|| self.bad("its url has no plain host"))?;
        if !matches!(uri.path(), "" | "/") || uri.query().is_some() {
            return Err(self.bad("its url has more than a host and a port"));
        }
        let here = host == "localhost"
            || host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback());
        if !tls && !here {
            return Err(self.bad("http:// is for this host alone; another one is asked by https://"));
        }
        let port = uri.port_u16().unwrap_or(if tls { 443 } else { 80 });
        Ok(Address { host, port, tls })
    }

    /// Reads the token.
    pub fn token(&self) -> Result<Option<String>> {
        let Some(path) = &self.token_file else { return Ok(None) };
        let bad = |detail: String| self.bad(&format!("{}: {detail}", path.display()));
        let file = std::fs::File::open(path).map_err(|error| bad(error.to_string()))?;
        let mut text = String::new();
        file.take(MAX_TOKEN).read_to_string(&mut text).map_err(|error| bad(error.to_string()))?;
        let token = text.trim();
        if token.is_empty() || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(bad("it has no token".to_owned()));
        }
        Ok(Some(token.to_owned()))
    }

    /// Reads the certificates that the zone's own may lead to.
    pub fn roots(&self) -> Result<rustls::RootCertStore> {
        let path = self.certificate.as_ref();
        let path = path.ok_or_else(|| self.bad("https needs the certificate that is to be trusted"))?;
        let bad = |detail: String| self.bad(&format!("{}: {detail}", path.display()));
        let mut roots = rustls::RootCertStore::empty();
        let found = CertificateDer::pem_file_iter(path).map_err(|error| bad(error.to_string()))?;
        for certificate in found {
            let certificate = certificate.map_err(|error| bad(error.to_string()))?;
            roots.add(certificate).map_err(|error| bad(error.to_string()))?;
        }
        if roots.is_empty() { Err(bad("it has no certificate".to_owned())) } else { Ok(roots) }
    }
}

#[cfg(test)]
mod tests {
    use super::{Address, Reuse, Zone};

    fn zone(url: &str) -> Zone {
        let (name, url) = ("east".to_owned(), url.to_owned());
        Zone { name, url, token_file: None, certificate: None, reuse: Reuse::Chain }
    }

    #[test]
    fn urls_are_hosts_and_ports() {
        let address = |host: &str, port, tls| Address { host: host.to_owned(), port, tls };
        for (url, is) in [
            ("https://a.example:7420", address("a.example", 7420, true)),
            ("https://a.example/", address("a.example", 443, true)),
            ("http://127.0.0.1:80", address("127.0.0.1", 80, false)),
            ("http://[::1]:7420", address("::1", 7420, false)),
        ] {
            assert_eq!(zone(url).address().unwrap(), is, "{url}");
        }
        for bad in [
            "",
            "a.example",
            "ftp://a.example",
            "http://a.example",
            "https://u:p@a.example",
            "https://a.example/x",
            "https://a.example/?x",
        ] {
            assert!(zone(bad).address().is_err(), "{bad}");
        }
        assert!(zone("https://a.example").roots().is_err());
    }
}
