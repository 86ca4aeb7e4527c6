//! Values of flags and of the configuration: durations, sizes, rates.

use std::time::Duration;

/// Reads `90s`, `24h`, `30d`; `0` is none at all.
pub fn duration(text: &str) -> Result<Duration, String> {
    if text == "0" {
        return Ok(Duration::ZERO);
    }
    humantime::parse_duration(text)
        .map_err(|error| format!("{text:?} is no duration like 90s, 24h, 30d: {error}"))
}

/// Reads `64MiB`, or plain bytes.
pub fn size(text: &str) -> Result<u64, String> {
    const UNITS: &[(&str, u32)] =
        &[("KiB", 10), ("MiB", 20), ("GiB", 30), ("TiB", 40), ("PiB", 50), ("B", 0), ("", 0)];
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    let shift = UNITS.iter().find(|(name, _)| *name == unit.trim()).map(|(_, shift)| *shift);
    let bytes = shift.and_then(|shift| number.parse::<u64>().ok()?.checked_mul(1 << shift));
    bytes.ok_or_else(|| format!("{text:?} is no size like 64MiB"))
}

/// Reads `200MiB/s`; 0 is no limit.
pub fn rate(text: &str) -> Result<u64, String> {
    size(text.strip_suffix("/s").unwrap_or(text)).map_err(|_| format!("{text:?} is no rate like 200MiB/s"))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{duration, rate, size};

    #[test]
    fn values() {
        assert_eq!(duration("90s"), Ok(Duration::from_secs(90)));
        assert_eq!(duration("30d"), Ok(Duration::from_hours(720)));
        assert_eq!(duration("0"), Ok(Duration::ZERO));
        assert!(duration("ten").is_err());
        assert_eq!(size("64MiB"), Ok(64 << 20));
        assert_eq!(size("512"), Ok(512));
        assert!(size("64MB").is_err());
        assert!(size("MiB").is_err());
        assert!(size("99999999999TiB").is_err());
        assert_eq!(rate("200MiB/s"), Ok(200 << 20));
        assert_eq!(rate("0"), Ok(0));
        assert!(rate("fast").is_err());
    }
}
