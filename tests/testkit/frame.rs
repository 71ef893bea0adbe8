use std::fmt;

/// One WebSocket frame (RFC 6455, section 5.2), which may be as illegal as a test wants it.
#[derive(Clone, PartialEq, Eq)]
pub struct Frame {
    /// Whether the message ends here.
    pub fin: bool,
    /// The three reserved bits.
    pub reserved: u8,
    /// The opcode.
    pub opcode: u8,
    /// The masking key. Frames that a server sent have none.
    pub mask: Option<[u8; 4]>,
    /// The payload, unmasked.
    pub payload: Vec<u8>,
}

impl Frame {
    /// A frame as a client sends it.
    pub fn new(opcode: u8, payload: &[u8]) -> Self {
        let mask = Some([0x37, 0xfa, 0x21, 0x3d]);
        Self { fin: true, reserved: 0, opcode, mask, payload: payload.to_vec() }
    }

    /// A continuation.
    pub fn continuation(payload: &[u8]) -> Self {
        Self::new(0, payload)
    }

    /// A text message.
    pub fn text(payload: &[u8]) -> Self {
        Self::new(1, payload)
    }

    /// A binary message.
    pub fn binary(payload: &[u8]) -> Self {
        Self::new(2, payload)
    }

    /// A close frame.
    pub fn close(code: u16, text: &str) -> Self {
        Self::new(8, &[&code.to_be_bytes(), text.as_bytes()].concat())
    }

    /// A ping.
    pub fn ping(payload: &[u8]) -> Self {
        Self::new(9, payload)
    }

    /// The same frame without its final bit: more fragments follow.
    #[must_use]
    pub fn unfinished(self) -> Self {
        Self { fin: false, ..self }
    }

    /// The same frame without a mask.
    #[must_use]
    pub fn unmasked(self) -> Self {
        Self { mask: None, ..self }
    }

    /// The same frame with reserved bits, of which 4 is the first.
    #[must_use]
    pub fn reserved(self, bits: u8) -> Self {
        Self { reserved: bits, ..self }
    }

    /// The frame as it travels.
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![u8::from(self.fin) << 7 | self.reserved << 4 | self.opcode];
        let masked = u8::from(self.mask.is_some()) << 7;
        match self.payload.len() {
            length @ 0..=125 => bytes.push(masked | u8::try_from(length).unwrap()),
            length @ 126..=0xffff => {
                bytes.push(masked | 0x7e);
                bytes.extend(u16::try_from(length).unwrap().to_be_bytes());
            }
            length => {
                bytes.push(masked | 0x7f);
                bytes.extend(u64::try_from(length).unwrap().to_be_bytes());
            }
        }
        let mask = self.mask.unwrap_or_default();
        bytes.extend(self.mask.iter().flatten());
        bytes.extend(self.payload.iter().zip(mask.iter().cycle()).map(|(byte, key)| byte ^ key));
        bytes
    }

    /// Takes one frame from the front of `buffer`, when a whole one is there.
    pub fn take(buffer: &mut Vec<u8>) -> Option<Self> {
        let (&first, &second) = (buffer.first()?, buffer.get(1)?);
        let (length, mut at) = match second & 0x7f {
            126 => (u64::from(u16::from_be_bytes(buffer.get(2..4)?.try_into().unwrap())), 4),
            127 => (u64::from_be_bytes(buffer.get(2..10)?.try_into().unwrap()), 10),
            short => (u64::from(short), 2),
        };
        let mut mask = None;
        if second & 0x80 != 0 {
            mask = Some(<[u8; 4]>::try_from(buffer.get(at..at + 4)?).unwrap());
            at += 4;
        }
        let end = at + usize::try_from(length).unwrap();
        let payload = buffer.get(at..end)?;
        let key = mask.unwrap_or_default();
        let payload = payload.iter().zip(key.iter().cycle()).map(|(byte, key)| byte ^ key).collect();
        buffer.drain(..end);
        Some(Self { fin: first & 0x80 != 0, reserved: first >> 4 & 7, opcode: first & 15, mask, payload })
    }

    /// Code and text, when this is a close frame that has them.
    pub fn close_reason(&self) -> Option<(u16, String)> {
        let (code, text) = self.payload.split_first_chunk().filter(|_| self.opcode == 8)?;
        Some((u16::from_be_bytes(*code), String::from_utf8_lossy(text).into_owned()))
    }
}

impl fmt::Debug for Frame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { fin, reserved, opcode, mask, payload } = self;
        let start = String::from_utf8_lossy(&payload[..payload.len().min(40)]);
        write!(
            f,
            "Frame {{ fin: {fin}, reserved: {reserved}, opcode: {opcode}, masked: {}, ",
            mask.is_some()
        )?;
        write!(f, "{} bytes: {start:?} }}", payload.len())
    }
}
