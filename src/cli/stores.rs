//! Which stores a call is about: `--store`, `QCHAIN_STORE`, or the configuration.

use std::path::{Path, PathBuf};

use super::error::{CliError, Result};
use super::settings::{Backing, Directories, StoreSettings};
use crate::backend::nfs3::NfsUrl;
use crate::cloudstack::backing::Style;
use crate::cloudstack::paths::Layout;
use crate::cloudstack::prefix::StoreUrl;
use crate::ids::StoreId;
use crate::store::StoreConfig;

/// The variable that stands for `--store`; several stores are separated by semicolons.
const VARIABLE: &str = "QCHAIN_STORE";

/// The stores of a call: the flags, else the variable, else the configuration.
pub fn configured(flags: &[String], settings: &[StoreSettings]) -> Result<Vec<StoreConfig>> {
    let variable = std::env::var(VARIABLE).unwrap_or_default();
    let named: Vec<&str> = if flags.is_empty() {
        variable.split(';').filter(|text| !text.is_empty()).collect()
    } else {
        flags.iter().map(String::as_str).collect()
    };
    if named.is_empty() {
        return settings.iter().map(of_settings).collect();
    }
    named.into_iter().map(|text| of_settings(&of_flag(text, settings)?)).collect()
}

/// A store that is given by its place, beside those of the call.
pub fn other(text: &str, settings: &[StoreSettings]) -> Result<StoreConfig> {
    of_settings(&of_flag(text, settings)?)
}

/// Reads `DIR_OR_EXPORT[,id=ID][,url=URL][,alias=PREFIX][,layout=primary]...`; a directory or an export without a mount
/// that the configuration knows keeps what is said of it there.
fn of_flag(text: &str, settings: &[StoreSettings]) -> Result<StoreSettings> {
    let (directory, rest) = text.split_once(',').map_or((text, None), |(dir, rest)| (dir, Some(rest)));
    if directory.is_empty() {
        return Err(CliError::usage(format!("--store {text:?} names no directory")));
    }
    let place = Place::of(directory)?;
    let known = settings.iter().find(|store| Place::of_settings(store).is_ok_and(|theirs| theirs == place));
    let mut store = known.cloned().unwrap_or(StoreSettings {
        id: None,
        path: None,
        url: None,
        aliases: Vec::new(),
        backing: Backing::default(),
        layout: Directories::default(),
    });
    match place {
        Place::Directory(path) => store.path = Some(path),
        Place::Export(_) => store.url = Some(directory.to_owned()),
    }
    for option in rest.into_iter().flat_map(|rest| rest.split(',')) {
        match option.split_once('=') {
            Some(("id", id)) => store.id = Some(id.to_owned()),
            Some(("url", url)) if store.path.is_some() => store.url = Some(url.to_owned()),
            Some(("alias", prefix)) => store.aliases.push(prefix.to_owned()),
            Some(("layout", "primary")) => store.layout = Directories::Primary,
            Some(("layout", "secondary")) => store.layout = Directories::Secondary,
            _ => {
                let message = format!(
                    "--store {text:?}: {option:?} is none of id=ID, url=URL (of a directory), alias=PREFIX, \
                     layout=primary or layout=secondary"
                );
                return Err(CliError::usage(message));
            }
        }
    }
    Ok(store)
}

fn of_settings(store: &StoreSettings) -> Result<StoreConfig> {
    let place = Place::of_settings(store)?;
    let (root, name) = match &place {
        Place::Directory(path) => {
            let root = path.to_str().ok_or_else(|| {
                CliError::usage(format!("the store's directory {} is not UTF-8", path.display()))
            })?;
            (root.to_owned(), path.file_name().and_then(|name| name.to_str()).unwrap_or("root"))
        }
        Place::Export(url) => (store.url.clone().unwrap_or_default(), url.name()),
    };
    let id = StoreId::parse(store.id.as_deref().unwrap_or(name)).map_err(|error| {
        CliError::usage(format!(
            "{root}: {error}; name the store (id=... here, id = ... in the configuration)"
        ))
    })?;
    let url = store.url.as_deref().map(StoreUrl::parse).transpose();
    let url = url.map_err(|error| CliError::usage(error.to_string()))?;
    if let Some(relative) = store.aliases.iter().find(|alias| !alias.starts_with('/')) {
        return Err(CliError::usage(format!("the alias {relative:?} is not absolute")));
    }
    let backing = match store.backing {
        Backing::Relative => Style::Relative,
        Backing::Keep => Style::Keep,
    };
    let layout = match store.layout {
        Directories::Secondary => Layout::Secondary,
        Directories::Primary => Layout::Primary,
    };
    Ok(StoreConfig { id, root, url, aliases: store.aliases.clone(), backing, layout })
}

/// Where a store is.
#[derive(Debug, PartialEq, Eq)]
enum Place {
    /// A directory, absolute.
    Directory(PathBuf),
    /// An export without a mount.
    Export(NfsUrl),
}

impl Place {
    fn of(text: &str) -> Result<Self> {
        if !text.contains("://") {
            return absolute(Path::new(text)).map(Self::Directory);
        }
        NfsUrl::parse(text).map(Self::Export).map_err(|error| CliError::usage(error.to_string()))
    }

    /// The path if there is one, else the URL.
    fn of_settings(store: &StoreSettings) -> Result<Self> {
        match (&store.path, &store.url) {
            (Some(path), _) => absolute(path).map(Self::Directory),
            (None, Some(url)) => Self::of(url),
            (None, None) => {
                Err(CliError::usage("a store of the configuration has neither path nor url".to_owned()))
            }
        }
    }
}

fn absolute(path: &Path) -> Result<PathBuf> {
    let absolute = std::path::absolute(path);
    // Without a trailing slash, so that two spellings are one.
    absolute
        .map(|path| path.components().collect())
        .map_err(|source| CliError::Read { file: path.display().to_string(), source })
}

#[cfg(test)]
mod tests {
    use super::{configured, of_flag};
    use crate::cloudstack::paths::Layout;
    use crate::failure::{Code, Failure};

    #[test]
    fn flags_are_taken_apart() {
        let flag = "/mnt/sec,url=nfs://nas/export,alias=/mnt/a,alias=/mnt/b".to_owned();
        let stores = configured(&[flag, "/mnt/other/".to_owned()], &[]).unwrap();
        assert_eq!((stores[0].id.as_str(), stores[0].root.as_str()), ("sec", "/mnt/sec"));
        assert!(stores[0].url.is_some());
        assert_eq!(stores[0].layout, Layout::Secondary);
        assert_eq!(stores[0].aliases, ["/mnt/a", "/mnt/b"]);
        assert_eq!((stores[1].id.as_str(), stores[1].root.as_str()), ("other", "/mnt/other"));
    }

    #[test]
    fn primary_storage_is_said_by_flag_or_configuration() {
        let flagged = configured(&["/mnt/pool,layout=primary".to_owned()], &[]).unwrap();
        let text = "[[stores]]\npath = \"/mnt/pool\"\nlayout = \"primary\"";
        let settings = super::super::settings::Settings::parse(text).unwrap().stores;
        for stores in [flagged, configured(&[], &settings).unwrap()] {
            assert_eq!(stores[0].layout, Layout::Primary);
        }
    }

    #[test]
    fn bad_flags() {
        for (flag, code) in [
            (",url=nfs://a/b", Code::Usage),
            ("/mnt/a,colour=red", Code::Usage),
            ("/mnt/a,layout=tertiary", Code::Usage),
            ("/mnt/a,url=ftp://x/y", Code::Usage),
            ("/mnt/a,alias=relative", Code::Usage),
            ("/mnt/a b", Code::Usage),
            ("nfs://nas", Code::Usage),
            ("nfs://nas/export?colour=red", Code::Usage),
            ("nfs://nas/export,url=nfs://nas/other", Code::Usage),
            ("nfs://nas/ex port", Code::Usage),
            ("smb://nas/export", Code::Usage),
        ] {
            let error = configured(&[flag.to_owned()], &[]).unwrap_err();
            assert_eq!((error.kind().exit_code(), error.code()), (2, code), "{flag}");
        }
    }

    #[test]
    fn exports_are_stores() {
        let flag = "nfs://nas:2050/export/sec1?uid=0,alias=/mnt/a".to_owned();
        let flagged = configured(std::slice::from_ref(&flag), &[]).unwrap();
        assert_eq!(flagged[0].id.as_str(), "sec1");
        assert_eq!(flagged[0].root, "nfs://nas:2050/export/sec1?uid=0");
        assert_eq!(flagged[0].url.as_ref().unwrap().to_string(), "nfs://nas/export/sec1");
        let named = configured(&["nfs://nas/export,id=other".to_owned()], &[]).unwrap();
        assert_eq!(named[0].id.as_str(), "other");
        let text = "[[stores]]\nid = \"one\"\nurl = \"nfs://nas:2050/export/sec1?uid=0\"";
        let settings = super::super::settings::Settings::parse(text).unwrap().stores;
        assert_eq!(configured(&[], &settings).unwrap()[0].root, flagged[0].root);
        assert_eq!(configured(&[flag], &settings).unwrap()[0].id.as_str(), "one");
    }

    #[test]
    fn what_the_configuration_says_of_a_directory_stays() {
        let text = "[[stores]]\nid = \"one\"\npath = \"/mnt/x\"\naliases = [\"/mnt/p\"]";
        let settings = super::super::settings::Settings::parse(text).unwrap().stores;
        let store = of_flag("/mnt/x/,alias=/mnt/q", &settings).unwrap();
        assert_eq!(store.id.as_deref(), Some("one"));
        assert_eq!(store.aliases, ["/mnt/p", "/mnt/q"]);
        assert_eq!(configured(&[], &settings).unwrap().len(), 1);
    }
}
