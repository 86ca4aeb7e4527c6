//! Rows of CloudStack's database: one per snapshot and store, as one SELECT exports them.
//!
//! The text is the output of `mysql --batch`: a line of column names, then one line a row, fields separated
//! by tabs, with `\t`, `\n`, `\\` and `\0` for the characters that would disturb, and `NULL`. Columns may
//! come in any order, and further ones are ignored. mysql prints nothing at all for an empty result, which
//! looks like an export that failed, so that is an error too.

use std::collections::HashMap;

use super::prefix::StoreUrl;
use crate::failure::{Code, Failure, Kind};

macro_rules! columns {
    ($($name:ident = $text:literal),+ $(,)?) => {
        /// The columns that are needed, named as in the export.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        enum Column { $($name),+ }

        impl Column {
            const ALL: &'static [Self] = &[$(Self::$name),+];

            fn name(self) -> &'static str {
                match self { $(Self::$name => $text),+ }
            }
        }

        /// The names of the columns that are needed, in the order of [`Records::of_values`].
        pub const COLUMNS: &[&str] = &[$($text),+];
    };
}

columns! {
    StoreUuid = "store_uuid",
    StoreUrl = "store_url",
    StoreRole = "store_role",
    SnapshotId = "snapshot_id",
    SnapshotUuid = "snapshot_uuid",
    SnapshotName = "snapshot_name",
    AccountId = "account_id",
    VolumeId = "volume_id",
    HypervisorType = "hypervisor_type",
    SnapshotStatus = "snapshot_status",
    RefState = "ref_state",
    InstallPath = "install_path",
    ParentSnapshotId = "parent_snapshot_id",
    EndOfChain = "end_of_chain",
    Size = "size",
    PhysicalSize = "physical_size",
    KvmCheckpointPath = "kvm_checkpoint_path",
    Created = "created",
}

/// Why an export cannot be read. Lines count from 1, the header's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecordsError {
    /// There is not even a header.
    #[error("the records are empty: the export failed, or found no row")]
    Empty,
    /// The header lacks a column.
    #[error("line 1: column {column} is missing")]
    MissingColumn {
        /// Its name.
        column: &'static str,
    },
    /// The header names a column twice.
    #[error("line 1: column {column} is there twice")]
    DoubledColumn {
        /// Its name.
        column: &'static str,
    },
    /// A line is not UTF-8.
    #[error("line {line}: not UTF-8")]
    NotText {
        /// Which line.
        line: usize,
    },
    /// A row has not as many fields as the header.
    #[error("line {line}: {found} fields, but the header has {expected}")]
    FieldCount {
        /// Which line.
        line: usize,
        /// How many it has.
        found: usize,
        /// How many the header has.
        expected: usize,
    },
    /// A field's text does not fit its column.
    #[error("line {line}, column {column}: {value:?} is {problem}")]
    Field {
        /// Which line.
        line: usize,
        /// The column's name.
        column: &'static str,
        /// The text, cut after 100 characters.
        value: String,
        /// What is wrong with it.
        problem: &'static str,
    },
}

impl Failure for RecordsError {
    fn kind(&self) -> Kind {
        Kind::Usage
    }

    fn code(&self) -> Code {
        Code::BadRecords
    }
}

/// The state of a snapshot on a store: `ObjectInDataStoreStateMachine.State`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RefState {
    /// In use.
    Ready,
    /// Deleted by its user; the file stays because of a living child.
    Hidden,
    /// Deleted for good.
    Destroyed,
    /// Any other, mostly one that passes.
    Other(String),
}

impl RefState {
    /// The state of that name.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        match text {
            "Ready" => Self::Ready,
            "Hidden" => Self::Hidden,
            "Destroyed" => Self::Destroyed,
            other => Self::Other(other.to_owned()),
        }
    }

    /// Whether CloudStack has given up a file in that state.
    #[must_use]
    pub fn is_given_up(&self) -> bool {
        matches!(self, Self::Hidden | Self::Destroyed)
    }

    /// The state as CloudStack writes it.
    #[must_use]
    pub fn as_str(&self) -> &str {
        match self {
            Self::Ready => "Ready",
            Self::Hidden => "Hidden",
            Self::Destroyed => "Destroyed",
            Self::Other(other) => other,
        }
    }
}

/// One row of `snapshot_store_ref`, with what belongs to it in `snapshots` and `image_store`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// Which line of the export it is, for messages.
    pub line: usize,
    /// The store's uuid.
    pub store_uuid: Option<String>,
    /// The store's URL.
    pub store_url: Option<String>,
    /// `Image` or `Primary`, mostly.
    pub store_role: String,
    /// The snapshot's number.
    pub snapshot_id: u64,
    /// The snapshot's uuid in the API; not its file name.
    pub snapshot_uuid: Option<String>,
    /// The name that users see.
    pub snapshot_name: Option<String>,
    /// The account's number.
    pub account_id: u64,
    /// The volume's number.
    pub volume_id: u64,
    /// `KVM`, mostly.
    pub hypervisor_type: Option<String>,
    /// The snapshot's own status, like `BackedUp` or `Destroyed`.
    pub snapshot_status: Option<String>,
    /// Its state on this store.
    pub ref_state: RefState,
    /// Where the file is: relative on an image store, absolute on primary storage.
    pub install_path: Option<String>,
    /// The parent's number; CloudStack's 0 is `None`.
    pub parent_snapshot_id: Option<u64>,
    /// Whether the next snapshot begins a new chain.
    pub end_of_chain: bool,
    /// The virtual size in bytes.
    pub size_bytes: Option<u64>,
    /// The file's length in bytes when it was made.
    pub physical_bytes: Option<u64>,
    /// The checkpoint file, as a path on KVM hosts.
    pub kvm_checkpoint_path: Option<String>,
    /// When it was made, as the database prints it.
    pub created: Option<String>,
}

impl Row {
    /// Whether CloudStack has given the file up: its state here is Hidden or Destroyed.
    #[must_use]
    pub fn deletable(&self) -> bool {
        self.ref_state.is_given_up()
    }
}

/// All rows of an export, or of the database itself.
#[derive(Clone, Debug, Default)]
pub struct Records {
    rows: Vec<Row>,
    by_path: HashMap<String, Vec<usize>>,
}

impl Records {
    /// Reads an export. Memory is in the size of the text.
    pub fn parse(text: &[u8]) -> Result<Self, RecordsError> {
        let mut lines = text.split(|byte| *byte == b'\n').enumerate().filter(|(_, line)| !line.is_empty());
        let (index, header) = lines.next().ok_or(RecordsError::Empty)?;
        let header = Header::parse(as_text(index, header)?)?;
        let mut records = Self::default();
        for (index, line) in lines {
            records.push(header.values(index + 1, as_text(index, line)?)?.row()?);
        }
        Ok(records)
    }

    /// Takes rows as the database gives them: for each the values of [`COLUMNS`], in that order, as the text
    /// that the server sends.
    pub fn of_values(rows: impl Iterator<Item = Vec<Option<String>>>) -> Result<Self, RecordsError> {
        let mut records = Self::default();
        for (index, values) in rows.enumerate() {
            let line = index + 1;
            let (found, expected) = (values.len(), COLUMNS.len());
            if found != expected {
                return Err(RecordsError::FieldCount { line, found, expected });
            }
            records.push(Fields { line, values }.row()?);
        }
        Ok(records)
    }

    fn push(&mut self, row: Row) {
        if let Some(path) = &row.install_path {
            let key = path.trim_start_matches('/').to_owned();
            self.by_path.entry(key).or_default().push(self.rows.len());
        }
        self.rows.push(row);
    }

    /// All rows, in the order of the export.
    #[must_use]
    pub fn rows(&self) -> &[Row] {
        &self.rows
    }

    /// The row of the file at an install path of a store. Without a URL, rows of all stores count; with
    /// one, only rows whose store has that URL (spelling aside, [`StoreUrl::same_export`]).
    ///
    /// If several rows fit, it is one that is *not* deletable if there is one: in doubt a file is in use.
    #[must_use]
    pub fn lookup(&self, install_path: &str, store_url: Option<&str>) -> Option<&Row> {
        let wanted = store_url.map(|url| (url, StoreUrl::parse(url).ok()));
        let fits = |row: &&Row| match (&wanted, row.store_url.as_deref()) {
            (None, _) => true,
            (Some(_), None) => false,
            (Some((url, parsed)), Some(theirs)) => {
                let same = |ours: &StoreUrl| StoreUrl::parse(theirs).is_ok_and(|url| url.same_export(ours));
                *url == theirs || parsed.as_ref().is_some_and(same)
            }
        };
        let found = self.by_path.get(install_path.trim_start_matches('/'))?;
        found.iter().filter_map(|index| self.rows.get(*index)).filter(fits).min_by_key(|row| row.deletable())
    }
}

fn as_text(index: usize, line: &[u8]) -> Result<&str, RecordsError> {
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    std::str::from_utf8(line).map_err(|_| RecordsError::NotText { line: index + 1 })
}

/// Where each needed column is, in the order of [`Column::ALL`].
struct Header {
    places: Vec<usize>,
    fields: usize,
}

impl Header {
    fn parse(line: &str) -> Result<Self, RecordsError> {
        let names: Vec<&str> = line.split('\t').collect();
        let place = |column: &Column| {
            let column = column.name();
            let mut found = names.iter().enumerate().filter(|(_, name)| **name == column);
            let (place, _) = found.next().ok_or(RecordsError::MissingColumn { column })?;
            if found.next().is_some() {
                return Err(RecordsError::DoubledColumn { column });
            }
            Ok(place)
        };
        let places = Column::ALL.iter().map(place).collect::<Result<_, _>>()?;
        Ok(Self { places, fields: names.len() })
    }

    /// The needed fields of a line, in the order of [`COLUMNS`].
    fn values(&self, line: usize, text: &str) -> Result<Fields, RecordsError> {
        let fields: Vec<&str> = text.split('\t').collect();
        if fields.len() != self.fields {
            return Err(RecordsError::FieldCount { line, found: fields.len(), expected: self.fields });
        }
        let value = |(column, place): (&Column, &usize)| match fields.get(*place).copied().unwrap_or_default()
        {
            "NULL" | "\\N" => Ok(None),
            raw => unescaped(raw).map(Some).ok_or_else(|| field_error(line, *column, raw, "badly escaped")),
        };
        let values = Column::ALL.iter().zip(&self.places).map(value).collect::<Result<_, _>>()?;
        Ok(Fields { line, values })
    }
}

fn field_error(line: usize, column: Column, value: &str, problem: &'static str) -> RecordsError {
    RecordsError::Field { line, column: column.name(), value: value.chars().take(100).collect(), problem }
}

/// The values of one row, in the order of [`COLUMNS`].
struct Fields {
    line: usize,
    values: Vec<Option<String>>,
}

impl Fields {
    fn row(mut self) -> Result<Row, RecordsError> {
        Ok(Row {
            line: self.line,
            store_uuid: self.take(Column::StoreUuid),
            store_url: self.take(Column::StoreUrl),
            store_role: self.needed(Column::StoreRole)?,
            snapshot_id: self.needed_number(Column::SnapshotId)?,
            snapshot_uuid: self.take(Column::SnapshotUuid),
            snapshot_name: self.take(Column::SnapshotName),
            account_id: self.needed_number(Column::AccountId)?,
            volume_id: self.needed_number(Column::VolumeId)?,
            hypervisor_type: self.take(Column::HypervisorType),
            snapshot_status: self.take(Column::SnapshotStatus),
            ref_state: RefState::parse(&self.needed(Column::RefState)?),
            install_path: self.take(Column::InstallPath).filter(|path| !path.is_empty()),
            parent_snapshot_id: self.number(Column::ParentSnapshotId)?.filter(|id| *id != 0),
            end_of_chain: self.flag(Column::EndOfChain)?,
            size_bytes: self.number(Column::Size)?,
            physical_bytes: self.number(Column::PhysicalSize)?,
            kvm_checkpoint_path: self.take(Column::KvmCheckpointPath).filter(|path| !path.is_empty()),
            created: self.take(Column::Created),
        })
    }

    fn take(&mut self, column: Column) -> Option<String> {
        self.values.get_mut(column as usize).and_then(Option::take)
    }

    fn error(&self, column: Column, value: Option<&str>, problem: &'static str) -> RecordsError {
        field_error(self.line, column, value.unwrap_or("NULL"), problem)
    }

    fn needed(&mut self, column: Column) -> Result<String, RecordsError> {
        self.take(column).ok_or_else(|| self.error(column, None, "not allowed to be NULL"))
    }

    fn number(&mut self, column: Column) -> Result<Option<u64>, RecordsError> {
        let text = self.take(column);
        let number = |text: &String| text.parse().map_err(|_| self.error(column, Some(text), "no number"));
        text.as_ref().map(number).transpose()
    }

    fn needed_number(&mut self, column: Column) -> Result<u64, RecordsError> {
        self.number(column)?.ok_or_else(|| self.error(column, None, "not allowed to be NULL"))
    }

    /// A number, or a BIT(1), which mysql prints as the byte itself.
    fn flag(&mut self, column: Column) -> Result<bool, RecordsError> {
        match self.take(column).as_deref() {
            None | Some("0" | "\0") => Ok(false),
            Some("1" | "\u{1}") => Ok(true),
            other => Err(self.error(column, other, "neither 0 nor 1")),
        }
    }
}

/// The text that mysql escaped; `None` for an escape that it does not write.
fn unescaped(raw: &str) -> Option<String> {
    let mut text = String::with_capacity(raw.len());
    let mut characters = raw.chars();
    while let Some(character) = characters.next() {
        text.push(match character {
            '\\' => match characters.next()? {
                't' => '\t',
                'n' => '\n',
                '0' => '\0',
                '\\' => '\\',
                _ => return None,
            },
            plain => plain,
        });
    }
    Some(text)
}

#[cfg(test)]
#[path = "records_tests.rs"]
mod tests;
