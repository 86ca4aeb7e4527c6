//! Bearer tokens: who may do what.
//!
//! The file has one token a line: `NAME SCOPE SECRET`, `#` for remarks. `SCOPE` is `read`, `operate` or `admin`, each
//! allowing what those before it do; or `peer`, for another zone: it may copy members and nothing else, with
//! `peer:ACCOUNT,ACCOUNT` those of these accounts alone. `SECRET` is `blake3:` and 64 hex digits, the BLAKE3 of the token, or the token
//! itself, at least 16 characters. The file must not be readable by others. Nothing of a token is ever logged.

use std::fmt;
use std::io::Read as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use subtle::ConstantTimeEq as _;

use super::error::ServiceError;

/// The largest file of tokens, in bytes.
const MAX_FILE_BYTES: u64 = 1 << 20;
/// The shortest token that is taken as such, in characters.
const LEAST_TOKEN: usize = 16;
/// The longest name, in bytes.
const LONGEST_NAME: usize = 64;
/// What a hashed token begins with.
const HASHED: &str = "blake3:";

/// How far a token reaches. Each allows what those before it do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Scope {
    /// Copy members to another zone, and nothing else.
    Peer,
    /// Look at everything, but for what is in members.
    Read,
    /// Have verbs run.
    Operate,
    /// Change how the service works.
    Admin,
}

impl Scope {
    fn parse(text: &str) -> Option<Self> {
        [Self::Peer, Self::Read, Self::Operate, Self::Admin].into_iter().find(|scope| scope.word() == text)
    }

    /// The word in the file.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Peer => "peer",
            Self::Read => "read",
            Self::Operate => "operate",
            Self::Admin => "admin",
        }
    }
}

/// Who asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// The token's name.
    pub name: String,
    /// How far it reaches.
    pub scope: Scope,
    /// Whose members may be copied with it; everybody's if there are none.
    pub accounts: Vec<u64>,
}

impl Caller {
    /// Whether what is in a member may be given away: who may look at chains may not read what is in them.
    #[must_use]
    pub fn may_copy(&self, account: Option<u64>) -> bool {
        let whose = self.accounts.is_empty() || account.is_some_and(|own| self.accounts.contains(&own));
        matches!(self.scope, Scope::Peer | Scope::Operate | Scope::Admin) && whose
    }
}

/// A scope, and the accounts that it is for.
fn reach(text: &str) -> Option<(Scope, Vec<u64>)> {
    match text.split_once(':') {
        None => Scope::parse(text).map(|scope| (scope, Vec::new())),
        Some(("peer", accounts)) => {
            let accounts = accounts.split(',').map(|account| account.parse().ok()).collect::<Option<_>>()?;
            Some((Scope::Peer, accounts))
        }
        Some(_) => None,
    }
}

struct Token {
    caller: Caller,
    hash: [u8; 32],
}

/// All tokens that are known.
#[derive(Default)]
pub struct Tokens(Vec<Token>);

impl fmt::Debug for Tokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} tokens", self.0.len())
    }
}

impl Tokens {
    /// Reads the file.
    pub fn read(path: &Path) -> Result<Self, ServiceError> {
        let failed = |detail: String| ServiceError::File { file: path.display().to_string(), detail };
        let file = std::fs::File::open(path).map_err(|error| failed(error.to_string()))?;
        let mode = file.metadata().map_err(|error| failed(error.to_string()))?.permissions().mode();
        if mode & 0o007 != 0 {
            return Err(failed("others may read or write it: chmod o-rwx".to_owned()));
        }
        let mut text = String::new();
        let read = file.take(MAX_FILE_BYTES).read_to_string(&mut text);
        read.map_err(|error| failed(error.to_string()))?;
        Self::parse(&text).map_err(failed)
    }

    /// Reads the text of a file. No message says anything of a secret.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut tokens: Vec<Token> = Vec::new();
        for (at, line) in text.lines().enumerate() {
            let line = line.split('#').next().unwrap_or_default();
            let words: Vec<&str> = line.split_whitespace().collect();
            let (name, scope, secret) = match words[..] {
                [] => continue,
                [name, scope, secret] => (name, scope, secret),
                _ => return Err(format!("line {}: not NAME SCOPE SECRET", at + 1)),
            };
            let (scope, accounts) = reach(scope).ok_or_else(|| {
                format!("line {}: {scope:?} is none of read, operate, admin, peer, peer:ACCOUNT,...", at + 1)
            })?;
            if name.len() > LONGEST_NAME || tokens.iter().any(|token| token.caller.name == name) {
                return Err(format!("line {}: the name is too long, or taken", at + 1));
            }
            let hash = hash_of(secret).ok_or_else(|| {
                format!(
                    "line {}: the secret is no {HASHED}DIGEST and has no {LEAST_TOKEN} characters",
                    at + 1
                )
            })?;
            tokens.push(Token { caller: Caller { name: name.to_owned(), scope, accounts }, hash });
        }
        if tokens.is_empty() { Err("it has no token".to_owned()) } else { Ok(Self(tokens)) }
    }

    /// Who shows that token. Takes as long whatever it is, but for its length.
    #[must_use]
    pub fn find(&self, token: &str) -> Option<&Caller> {
        let hash = *blake3::hash(token.as_bytes()).as_bytes();
        let mut found = None;
        for one in &self.0 {
            if bool::from(one.hash.ct_eq(&hash)) {
                found = Some(&one.caller);
            }
        }
        found
    }
}

fn hash_of(secret: &str) -> Option<[u8; 32]> {
    match secret.strip_prefix(HASHED) {
        Some(digits) => blake3::Hash::from_hex(digits).ok().map(|hash| *hash.as_bytes()),
        None if secret.len() >= LEAST_TOKEN => Some(*blake3::hash(secret.as_bytes()).as_bytes()),
        None => None,
    }
}

#[cfg(test)]
mod tests {
    use super::{Scope, Tokens};

    #[test]
    fn tokens_are_found_by_themselves_and_by_their_hash() {
        let hash = blake3::hash(b"another-secret-token").to_hex();
        let text = format!("# who\nops admin plain-secret-token # me\n\nmon read blake3:{hash}\n");
        let tokens = Tokens::parse(&text).unwrap();
        assert_eq!(tokens.find("plain-secret-token").unwrap().scope, Scope::Admin);
        assert_eq!(tokens.find("another-secret-token").unwrap().name, "mon");
        assert!(tokens.find(&format!("blake3:{hash}")).is_none(), "the hash is no token");
        assert!(tokens.find("").is_none());
        assert!(!format!("{tokens:?}").contains("secret"));
    }

    #[test]
    fn peers_copy_and_do_nothing_else() {
        let tokens = Tokens::parse(
            "east peer plain-secret-token\nwest peer:2,7 other-secret-token\nmon read third-secret-token",
        )
        .unwrap();
        let may = |token: &str, account| tokens.find(token).unwrap().may_copy(account);
        assert!(may("plain-secret-token", Some(5)) && may("plain-secret-token", None));
        assert!(may("other-secret-token", Some(7)) && !may("other-secret-token", Some(5)));
        assert!(!may("other-secret-token", None) && !may("third-secret-token", Some(2)));
        assert!(tokens.find("plain-secret-token").unwrap().scope < Scope::Read);
    }

    #[test]
    fn bad_files_are_told_without_their_secrets() {
        for bad in [
            "",
            "ops admin",
            "ops root plain-secret-token",
            "ops admin short-secret",
            "ops read:2 plain-secret-token",
            "ops peer:x plain-secret-token",
            "ops admin blake3:12",
            "a read plain-secret-token\na read other-secret-token",
        ] {
            let error = Tokens::parse(bad).unwrap_err();
            assert!(!error.contains("secret-"), "{error}");
        }
    }
}
