//! Fields of Firecracker's that are accepted at their defaults only.

use super::error::{ConfigError, require};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A field or section of Firecracker's without a counterpart here. Absent, `null` and `[]` are
/// accepted; any other value is stored, and refused by `validate`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Unsupported {
    given: bool,
}

impl Unsupported {
    pub(super) fn refuse(self, field: &str, hint: &str) -> Result<(), ConfigError> {
        require(!self.given, field, hint)
    }

    pub(super) fn is_absent(&self) -> bool {
        !self.given
    }
}

impl<'de> Deserialize<'de> for Unsupported {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        use serde_json::Value;
        let given = match Value::deserialize(deserializer)? {
            Value::Null => false,
            Value::Array(items) => !items.is_empty(),
            _ => true,
        };
        Ok(Self { given })
    }
}

impl Serialize for Unsupported {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_none()
    }
}

/// Firecracker's token bucket: `size` tokens refilled over `refill_time` milliseconds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenBucket {
    /// Tokens the bucket holds.
    pub size: u64,
    /// Extra tokens at the start.
    pub one_time_burst: Option<u64>,
    /// Milliseconds to refill the bucket.
    pub refill_time: u64,
}

impl TokenBucket {
    /// Firecracker reads a bucket without size or refill time as no limit.
    pub(super) fn limits(&self) -> bool {
        self.size != 0 && self.refill_time != 0
    }
}

/// Firecracker's pair of token buckets. Only the value that limits nothing is accepted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimiter {
    /// Bytes.
    pub bandwidth: Option<TokenBucket>,
    /// Operations.
    pub ops: Option<TokenBucket>,
}

impl RateLimiter {
    pub(super) fn refuse_limits(limiter: Option<&Self>, field: &str) -> Result<(), ConfigError> {
        let limits = limiter.is_some_and(|limiter| {
            [&limiter.bandwidth, &limiter.ops]
                .into_iter()
                .flatten()
                .any(TokenBucket::limits)
        });
        require(
            !limits,
            field,
            "rate limits are not supported; leave it out and limit on the host (tc, io.max)",
        )
    }
}
